"""Short documents, and documents with listed words."""

import functools
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import Filter, FilterSpec, read_list, thresholds_and_splitter
from megagpt.corpus.text.languages import UNSPACED_LANGUAGES, language_of
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter, analyse
from megagpt.documents import Document, Rejected


class MinLengthConfig(Config):
    """Refuse short documents (in no paper's default set of filters)."""

    min_characters: Annotated[int, Field(ge=0)] | None = 200
    """Unicode code points."""
    min_words: Annotated[int, Field(ge=0)] | None = None
    """Words, punctuation marks included."""


def min_length(document: Document, config: MinLengthConfig, *, splitter: Splitter = DEFAULT_SPLITTER) -> Document | Rejected:
    """Refuse short documents. Words include punctuation marks; languages without spaces pass the rule on words."""
    if config.min_characters is not None and len(document.text) < config.min_characters:
        return Rejected(document, "min_length:characters")
    if config.min_words is None or language_of(document) in UNSPACED_LANGUAGES:
        return document
    if analyse(document.text, splitter).num_words < config.min_words:
        return Rejected(document, "min_length:words")
    return document


MIN_LENGTH = FilterSpec(MinLengthConfig, thresholds_and_splitter(min_length), spaced_only=("min_words",))


class BadWordsConfig(Config):
    """Refuse documents with listed words: C4's rule, with your files."""

    files: dict[str, Path] = Field(default={})
    """By language a file of words or phrases, one a line. A language without a file passes."""
    max_count: int = Field(default=0, ge=0)
    """So many occurrences are let through. C4: 0."""


def bad_words(document: Document, config: BadWordsConfig, *, patterns: dict[str, re.Pattern[str]]) -> Document | Rejected:
    """Refuse documents with more than `max_count` listed words of their language; languages without a list pass (C4's rule)."""
    pattern = patterns.get(language_of(document))
    if pattern is None:
        return document
    for count, _ in enumerate(pattern.finditer(document.text.lower()), start=1):
        if count > config.max_count:
            return Rejected(document, "bad_words:listed")
    return document


@functools.cache
def load_bad_words(files: tuple[tuple[str, Path], ...]) -> dict[str, re.Pattern[str]]:
    """Per language one expression: whole words, or any place in languages without spaces."""
    patterns = {}
    for code, path in files:
        words = "|".join(re.escape(word.lower()) for word in sorted(read_list(path), key=len, reverse=True))
        if words:
            patterns[code] = re.compile(words if code in UNSPACED_LANGUAGES else rf"(?<!\w)(?:{words})(?!\w)")
    return patterns


def _bind_bad_words(config: BadWordsConfig, _: Splitter) -> Filter:
    return functools.partial(bad_words, config=config, patterns=load_bad_words(tuple(sorted(config.files.items()))))


BAD_WORDS = FilterSpec(BadWordsConfig, _bind_bad_words)
