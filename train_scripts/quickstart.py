"""Run ``scorefield demo``; for ``accelerate launch train_scripts/quickstart.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
