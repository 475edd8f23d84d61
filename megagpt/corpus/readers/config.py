"""Names of input formats in the settings."""

from typing import Literal, TypeAlias

SourceFormat: TypeAlias = Literal["web", "wikipedia", "jsonl", "text", "parquet", "datasets"]


Format: TypeAlias = Literal["auto", SourceFormat]


TextUnit: TypeAlias = Literal["file", "paragraph", "line"]
