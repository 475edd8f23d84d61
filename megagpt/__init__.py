"""MegaGPT: from raw web dumps to a trained GPT. The corpus half makes token shards, the training half makes a model of them."""

__version__ = "0.1.0"
