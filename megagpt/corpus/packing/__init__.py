"""Documents to shards of tokens."""
