"""Ranks, ports, determinism and the health of a node."""
