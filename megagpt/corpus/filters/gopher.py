"""Gopher's rules (arXiv 2112.11446): repetition within a document, and quality.

Definitions follow datatrove 0.10 (denominators, order, lines), since the paper leaves them open.
"""

import re
from typing import Annotated

import numpy as np
from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, Ratio, above, below, thresholds_and_splitter
from megagpt.corpus.text.languages import UNSPACED_LANGUAGES, language_of
from megagpt.corpus.text.punctuation import TERMINAL_PUNCTUATION
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter, analyse, count_duplicates
from megagpt.documents import Document, Rejected


class GopherRepetitionConfig(Config):
    """Repetition within a document: arXiv 2112.11446, Table A1. null switches a rule off."""

    max_duplicate_lines: Ratio | None = 0.30
    """Share of lines (split at runs of newlines) that occurred before."""
    max_duplicate_paragraphs: Ratio | None = 0.30
    """Share of paragraphs (split at two or more newlines) that occurred before."""
    max_duplicate_line_chars: Ratio | None = 0.20
    """Characters of such lines over all characters."""
    max_duplicate_paragraph_chars: Ratio | None = 0.20
    """Characters of such paragraphs over all characters."""
    max_top_n_gram_chars: dict[Annotated[int, Field(ge=2, le=4)], Ratio] = Field(default={2: 0.20, 3: 0.18, 4: 0.16})
    """By n: characters of the most frequent n-gram, spaces included, times its count, over all characters."""
    max_duplicate_n_gram_chars: dict[Annotated[int, Field(ge=5, le=10)], Ratio] = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    """By n: characters, without spaces, of n-grams that occurred before, over all characters."""


class GopherQualityConfig(Config):
    """Gopher's quality rules: arXiv 2112.11446, A1.1. null switches a rule off."""

    min_words: Annotated[int, Field(ge=0)] | None = 50
    """Words that are not symbols."""
    max_words: Annotated[int, Field(ge=1)] | None = 100_000
    """Words that are not symbols."""
    min_mean_word_length: Annotated[float, Field(ge=0)] | None = 3
    """Mean characters of words that are not symbols."""
    max_mean_word_length: Annotated[float, Field(ge=0)] | None = 10
    """Mean characters of words that are not symbols."""
    max_symbol_ratio: Annotated[float, Field(ge=0)] | None = 0.1
    """Hash signs per word, and ellipses per word."""
    max_bullet_lines: Ratio | None = 0.9
    """Share of lines that begin with a bullet or a hyphen."""
    max_ellipsis_lines: Ratio | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: Ratio | None = 0.8
    """Share of words with a letter. Punctuation marks are words, too, for our splitter and for datatrove's."""
    min_stop_words: Annotated[int, Field(ge=0)] | None = 2
    """Distinct words of {the, be, to, of, and, that, have, with}, as datatrove does; DCLM counts occurrences. English only."""


STOP_WORDS: dict[str, frozenset[str]] = {"en": frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})}
SYMBOLS = (
    TERMINAL_PUNCTUATION
    + "\"#$%&'()*+,-/:;<=>@[\\]^_`{|}~«´»–—’“”„…∶━►、〈〉《》「」【】％（），１：；～"
    + "".join(map(chr, (*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0))))
)
"""A word of these characters alone is a symbol for Gopher's length rules (datatrove's set, full-width 1 included)."""
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


def gopher_repetition(
    document: Document, config: GopherRepetitionConfig, *, splitter: Splitter = DEFAULT_SPLITTER
) -> Document | Rejected:
    """Repetition within a document (arXiv 2112.11446, Table A1). Shares of characters are of the whole text.

    Languages written without spaces pass the rules on n-grams: between their spaces are clauses, not words.
    """
    text = document.text
    if not text:
        return Rejected(document, "gopher_repetition:empty")
    for what, pieces, max_count, max_chars in (
        ("paragraph", _paragraphs(text.strip()), config.max_duplicate_paragraphs, config.max_duplicate_paragraph_chars),
        ("line", _lines(text), config.max_duplicate_lines, config.max_duplicate_line_chars),
    ):
        count, characters = count_duplicates(pieces)
        if above(count / len(pieces), max_count):
            return Rejected(document, f"gopher_repetition:duplicate_{what}s")
        if above(characters / len(text), max_chars):
            return Rejected(document, f"gopher_repetition:duplicate_{what}_chars")
    if language_of(document) in UNSPACED_LANGUAGES:
        return document
    counts = analyse(text, splitter).repeated_n_grams
    for n, limit in sorted(config.max_top_n_gram_chars.items()):
        if counts.top.get(n, 0) / len(text) > limit:
            return Rejected(document, f"gopher_repetition:top_{n}_gram")
    for n, limit in sorted(config.max_duplicate_n_gram_chars.items()):
        if counts.duplicate[n] / len(text) > limit:
            return Rejected(document, f"gopher_repetition:duplicate_{n}_grams")
    return document


def gopher_quality(
    document: Document, config: GopherQualityConfig, *, splitter: Splitter = DEFAULT_SPLITTER
) -> Document | Rejected:
    """Gopher's quality rules (arXiv 2112.11446, A1.1). Lengths leave symbols out; ratios are over all words."""
    text, language = document.text, language_of(document)
    analysis = analyse(text, splitter)
    (different, _), counts, num_words = analysis.numbered, analysis.word_counts, analysis.num_words
    has_letter, is_solid = _letters_and_symbols(different)
    reason = None
    if language not in UNSPACED_LANGUAGES:
        lengths = np.fromiter(map(len, different), np.int64, len(different))
        reason = _word_rule(lengths[is_solid], counts[is_solid], config) or _symbol_rule(text, num_words, config)
    lines = text.splitlines()
    if reason is None and lines:
        if above(sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines), config.max_bullet_lines):
            reason = "too_many_bullet_lines"
        elif above(_ellipsis_lines(text, lines) / len(lines), config.max_ellipsis_lines):
            reason = "too_many_ellipsis_lines"
    with_letter = int(counts[has_letter].sum()) / max(1, num_words)
    if reason is None and num_words and language not in UNSPACED_LANGUAGES and below(with_letter, config.min_alphabetic_words):
        reason = "too_few_alphabetic_words"
    stop_words = STOP_WORDS.get(language)
    if reason is None and stop_words and below(len(stop_words.intersection(different)), config.min_stop_words):
        reason = "too_few_stop_words"
    return document if reason is None else Rejected(document, f"gopher_quality:{reason}")


def _ellipsis_lines(text: str, lines: list[str]) -> int:
    """How many lines end in an ellipsis. Most texts have none."""
    return sum(line.rstrip().endswith(("...", "…")) for line in lines) if "..." in text or "…" in text else 0


def _paragraphs(text: str) -> list[str]:
    """What two or more newlines separate."""
    return _PARAGRAPHS.split(text) if "\n\n" in text else [text]


def _lines(text: str) -> list[str]:
    """What runs of newlines separate."""
    return _LINES.split(text) if "\n\n" in text else text.split("\n")


def _word_rule(lengths: np.ndarray, counts: np.ndarray, config: GopherQualityConfig) -> str | None:
    """lengths and counts of the different words that are not symbols."""
    num_words = int(counts.sum())
    if below(num_words, config.min_words):
        return "too_few_words"
    if above(num_words, config.max_words):
        return "too_many_words"
    mean = int((lengths * counts).sum()) / num_words if num_words else 0.0
    if below(mean, config.min_mean_word_length):
        return "words_too_short"
    return "words_too_long" if above(mean, config.max_mean_word_length) else None


def _symbol_rule(text: str, num_words: int, config: GopherQualityConfig) -> str | None:
    if above(text.count("#") / max(1, num_words), config.max_symbol_ratio):
        return "too_many_hashes"
    if above((text.count("...") + text.count("…")) / max(1, num_words), config.max_symbol_ratio):
        return "too_many_ellipses"
    return None


def _letters_and_symbols(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which words have a letter, and which are more than symbols: bool arrays."""
    has_letter = np.fromiter(map(str.isalpha, words), bool, len(words))
    is_solid = has_letter.copy()
    for i in np.flatnonzero(~has_letter).tolist():
        has_letter[i] = any(map(str.isalpha, words[i]))
        is_solid[i] = words[i].strip(SYMBOLS) != ""
    return has_letter, is_solid


GOPHER_REPETITION = FilterSpec(
    GopherRepetitionConfig,
    thresholds_and_splitter(gopher_repetition),
    spaced_only=("max_top_n_gram_chars", "max_duplicate_n_gram_chars"),
)


GOPHER_QUALITY = FilterSpec(
    GopherQualityConfig,
    thresholds_and_splitter(gopher_quality),
    word_lists={"min_stop_words": STOP_WORDS},
    spaced_only=(
        "min_words", "max_words", "min_mean_word_length", "max_mean_word_length", "max_symbol_ratio", "min_alphabetic_words",
    ),
)  # fmt: skip
