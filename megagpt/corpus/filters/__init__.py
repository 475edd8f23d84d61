"""Filters: which documents are kept, and how their text is rewritten."""
