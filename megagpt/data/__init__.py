"""Shards on disk to batches of samples, in an order computed from the seed."""
