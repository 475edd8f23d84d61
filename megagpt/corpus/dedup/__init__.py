"""Which documents are copies of others."""
