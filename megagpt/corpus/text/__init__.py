"""Words, n-grams and shingles, shared by filters, dedup and packing."""
