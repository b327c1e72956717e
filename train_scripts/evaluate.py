"""Run ``scorefield evaluate``; for ``accelerate launch train_scripts/evaluate.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
