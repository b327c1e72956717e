"""Run ``scorefield control``; for ``accelerate launch train_scripts/train_controlnet.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["control", *sys.argv[1:]])
