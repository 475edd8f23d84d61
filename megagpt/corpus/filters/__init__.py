"""Which documents are good enough, and how their text is rewritten."""
