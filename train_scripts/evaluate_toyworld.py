"""Run ``scorefield toyworld evaluate``; for ``accelerate launch train_scripts/evaluate_toyworld.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["toyworld", "evaluate", *sys.argv[1:]])
