"""Run ``scorefield sds``; for ``accelerate launch train_scripts/train_sds.py``."""

import sys

from scorefield.cli import main

if __name__ == "__main__":
    main(["sds", *sys.argv[1:]])
