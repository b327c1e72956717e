"""Run ``scorefield distill``; for ``accelerate launch train_scripts/train_dmd.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
