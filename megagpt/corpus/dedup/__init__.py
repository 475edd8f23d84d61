"""Deduplication: exact copies, near duplicates, repeated lines."""
