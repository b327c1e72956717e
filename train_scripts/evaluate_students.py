"""Run ``scorefield toyworld students``; for ``accelerate launch train_scripts/evaluate_students.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["toyworld", "students", *sys.argv[1:]])
