"""The training loop, its checkpoints, and what several ranks share."""
