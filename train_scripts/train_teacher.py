"""Run ``scorefield teacher``; for ``accelerate launch train_scripts/train_teacher.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["teacher", *sys.argv[1:]])
