"""The training loop, its configuration and its checks before the start."""
