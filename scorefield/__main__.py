"""``python -m scorefield`` and ``accelerate launch -m scorefield``: the console command."""

from scorefield.cli import main

if __name__ == "__main__":
    main()
