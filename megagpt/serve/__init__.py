"""A trained model behind an HTTP interface that OpenAI's clients understand."""
