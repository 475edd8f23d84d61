"""The CPU half: dumps to documents, documents to token shards. Nothing in here imports torch."""
