"""The portable checkpoint: save, load, list, verify, prune."""
