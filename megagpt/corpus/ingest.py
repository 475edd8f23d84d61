"""From dumps to documents: the first stage, which ties the readers of sources.py to the extractors."""

from pydantic import Field

from megagpt.config import Config


class ExtractConfig(Config):
    """Settings of `tools/extract_documents.py`."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Dumps: paths, globs, and lists of paths (a name that ends in .paths, .paths.gz or .txt.paths)."""
    source: str = "web"
    """Name of the corpus; each document carries it."""
