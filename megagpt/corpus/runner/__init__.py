"""Runs a pure function over many files: blocks, workers, commits, ownership. Knows no stage."""
