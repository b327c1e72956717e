"""Run ``scorefield features``; for ``accelerate launch train_scripts/train_features.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["features", *sys.argv[1:]])
