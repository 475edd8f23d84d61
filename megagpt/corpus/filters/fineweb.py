"""FineWeb's own rules (arXiv 2406.17557, section 3.6). Definitions follow datatrove 0.10."""

from typing import Annotated

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, Ratio, above, below, thresholds_and_splitter
from megagpt.corpus.text.languages import DENSE_LANGUAGES, DENSE_WEIGHT, UNPUNCTUATED_LANGUAGES, UNSPACED_LANGUAGES, language_of
from megagpt.corpus.text.punctuation import TERMINAL_PUNCTUATION
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter, analyse, count_duplicates
from megagpt.documents import Document, Rejected


class FineWebConfig(Config):
    """FineWeb's own rules: arXiv 2406.17557, section 3.6. null switches a rule off."""

    min_punctuated_lines: Ratio | None = 0.12
    """Share of lines that end in terminal punctuation of any script."""
    max_short_lines: Ratio | None = 0.67
    """Share of lines of at most `short_line_length` characters."""
    short_line_length: int = Field(default=30, ge=0)
    """Characters. Chinese and Japanese, whose characters hold more, are measured with 1/2.5 of it (12)."""
    max_duplicate_line_chars: Ratio | None = 0.01
    """Characters in repeated lines over all but newlines. The code and appendix E.4: above 0.01; section 3.6: 0.1 or more."""
    max_newline_ratio: Annotated[float, Field(ge=0)] | None = 0.3
    """Newlines per word."""


_TERMINAL = frozenset(TERMINAL_PUNCTUATION)


def fineweb(document: Document, config: FineWebConfig, *, splitter: Splitter = DEFAULT_SPLITTER) -> Document | Rejected:
    """FineWeb's own rules (arXiv 2406.17557, 3.6). Lines are the non-blank ones; newlines are counted per word."""
    text = document.text
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return Rejected(document, "fineweb:empty")
    language = language_of(document)
    punctuated = sum(line[-1] in _TERMINAL for line in lines) / len(lines)
    if language not in UNPUNCTUATED_LANGUAGES and below(punctuated, config.min_punctuated_lines):
        return Rejected(document, "fineweb:few_punctuated_lines")
    short = config.short_line_length / (DENSE_WEIGHT if language in DENSE_LANGUAGES else 1)
    if above(sum(len(line) <= short for line in lines) / len(lines), config.max_short_lines):
        return Rejected(document, "fineweb:short_lines")
    newlines = text.count("\n")
    if above(count_duplicates(lines)[1] / (len(text) - newlines), config.max_duplicate_line_chars):
        return Rejected(document, "fineweb:duplicate_line_chars")
    if not newlines or config.max_newline_ratio is None or language in UNSPACED_LANGUAGES:
        return document
    if newlines / max(1, analyse(text, splitter).num_words) > config.max_newline_ratio:
        return Rejected(document, "fineweb:list_like")
    return document


FINEWEB = FilterSpec(
    FineWebConfig,
    thresholds_and_splitter(fineweb),
    spaced_only=("max_newline_ratio",),
    punctuated_only=("min_punctuated_lines",),
)
