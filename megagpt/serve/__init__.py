"""Serve a trained model over an HTTP interface that OpenAI's clients understand."""
