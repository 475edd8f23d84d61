"""The extract section of a corpus."""

from typing import Literal, TypeAlias

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.readers.config import Format, TextUnit

Markup: TypeAlias = Literal["text", "markdown"]
Comments: TypeAlias = Literal["drop", "keep"]


class ExtractConfig(Config):
    """Settings of `tools/extract_documents.py`."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Dumps: paths, globs, URLs, lists of paths (*.paths, *.paths.gz), or datasets:NAME (a folder, or a name on the hub)."""
    inputs_root: str = ""
    """Folder or URL below which the lines of a list of paths lie. Default: the list's own folder."""
    format: Format = "auto"
    """auto goes by the name: .warc .arc .wet (web), .xml (wikipedia), .jsonl, .txt (text), .parquet; with .gz .bz2 .zst."""
    source: str = "web"
    """Name of the corpus; every document carries it."""
    extractor: Literal["fast", "trafilatura"] = "fast"
    """HTML to main text: megagpt's own, or trafilatura (ten times slower)."""
    markup: Markup = "text"
    """The form of extracted HTML pages: plain text, or Markdown (headings, lists, tables, code with its language)."""
    comments: Comments = "drop"
    """Readers' comments below an article: drop or keep. The posts of a forum's thread are kept in any case."""
    languages: tuple[str, ...] = ()
    """Languages that are wanted (ISO 639 codes as fastText's lid.176 has them): HTML pages that are surely in another one are
    rejected before their main text is looked for. Empty: all are extracted. The language filter still decides on the rest."""
    min_other_language_score: float = Field(default=0.9, ge=0, le=1)
    """Least score at which a page counts as being in another language."""
    max_page_cpu_seconds: float = Field(default=20.0, gt=0)
    """CPU time that one page may take; beyond it the page is rejected."""
    text_field: str = "text"
    """The field that holds the text (jsonl, parquet, datasets)."""
    text_unit: TextUnit = "file"
    """The part of a text file that is one document."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
