"""The GPT: one page for the whole model, its parts beside it."""
