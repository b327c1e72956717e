"""Run ``scorefield sample``; for ``accelerate launch train_scripts/sample.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
