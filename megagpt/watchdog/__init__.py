"""Finds the rank and the operation on which a run hangs."""
