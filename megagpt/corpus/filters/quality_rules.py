"""The published rules on text quality: Gopher, C4, FineWeb and RefinedWeb, as pure functions Document -> Document | Rejected.

Thresholds are keyword arguments; None switches a rule off. Definitions follow datatrove 0.10 (denominators, order, lines),
since papers leave them open; `splitter` supplies words and sentences. Rules that need word lists of a language look at
meta["language"] (absent: English) and let the languages that have none pass; `rules_passed` names them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter, analyse, count_duplicates
from megagpt.documents import Document, Rejected

STOP_WORDS: dict[str, frozenset[str]] = {"en": frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})}
POLICY_PHRASES: dict[str, tuple[str, ...]] = {
    "en": ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
}
SOCIAL_COUNTERS: dict[str, str] = {
    "en": "likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views|followers"
}
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz", "wuu", "yue"})
"""Languages written without spaces: rules about the number and the length of words do not apply to them."""

LANGUAGE_BOUND: dict[str, Mapping[str, object]] = {
    "gopher_quality.min_stop_words": STOP_WORDS,
    "c4.drop_policy_lines": POLICY_PHRASES,
    "refinedweb.drop_social_counters": SOCIAL_COUNTERS,
}
SPACE_BOUND = (
    "gopher_quality.min_words",
    "gopher_quality.max_words",
    "gopher_quality.min_mean_word_length",
    "gopher_quality.max_mean_word_length",
    "gopher_quality.max_symbol_ratio",
    "gopher_quality.min_alphabetic_words",
    "c4.min_words_per_line",
    "c4.max_word_length",
    "fineweb.max_newline_ratio",
    "refinedweb.min_words_per_line",
)


def _characters(ranges: str) -> str:
    pairs = [item.partition("-") for item in ranges.split()]
    return "".join(chr(code) for first, _, last in pairs for code in range(int(first, 16), int(last or first, 16) + 1))


TERMINAL_PUNCTUATION = _characters(
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 "
    "17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e "
    "2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 "
    "fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 "
    "111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 "
    "11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f "
    "1da88"
)
"""Marks that end a sentence in any script (Unicode's Sentence_Terminal, as datatrove lists them)."""
SYMBOLS = (
    TERMINAL_PUNCTUATION
    + "\"#$%&'()*+,-/:;<=>@[\\]^_`{|}~«´»–—’“”„…∶━►、〈〉《》「」【】％（），１：；～"
    + _characters("0-8 b-1f 7f-9f")
)
"""A word of these characters alone is a symbol for Gopher's length rules (datatrove's set, full-width 1 included)."""

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_COUNTERS = {
    language: re.compile(rf"^\W*\d(?:,|\.|\d)*(?:K|k|M|m|B|b)?\s+(?:{nouns})\W*$")
    for language, nouns in SOCIAL_COUNTERS.items()
}


def language_of(document: Document) -> str:
    """The language a document was found to be in; English where no stage has looked."""
    found = document.meta.get("language")
    return found if isinstance(found, str) and found else "en"


def rules_passed(language: str) -> list[str]:
    """Names of the rules that let every document of `language` pass: it has no word lists for them, or no spaces."""
    names = [name for name, lists in LANGUAGE_BOUND.items() if language not in lists]
    return names + [name for name in SPACE_BOUND if language in UNSPACED_LANGUAGES]


def gopher_repetition(
    document: Document,
    *,
    max_duplicate_lines: float | None = 0.30,
    max_duplicate_paragraphs: float | None = 0.30,
    max_duplicate_line_chars: float | None = 0.20,
    max_duplicate_paragraph_chars: float | None = 0.20,
    max_top_n_gram_chars: Mapping[int, float] = {2: 0.20, 3: 0.18, 4: 0.16},
    max_duplicate_n_gram_chars: Mapping[int, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
    splitter: Splitter = DEFAULT_SPLITTER,
) -> Document | Rejected:
    """Repetition within a document (arXiv 2112.11446, Table A1). Shares of characters are of the whole text."""
    text = document.text
    if not text:
        return Rejected(document, "gopher_repetition:empty")
    for what, pieces, max_count, max_chars in (
        ("paragraph", _paragraphs(text.strip()), max_duplicate_paragraphs, max_duplicate_paragraph_chars),
        ("line", _lines(text), max_duplicate_lines, max_duplicate_line_chars),
    ):
        count, characters = count_duplicates(pieces)
        if _above(count / len(pieces), max_count):
            return Rejected(document, f"gopher_repetition:duplicate_{what}s")
        if _above(characters / len(text), max_chars):
            return Rejected(document, f"gopher_repetition:duplicate_{what}_chars")
    counts = analyse(text, splitter).repeated_n_grams
    for n, limit in sorted(max_top_n_gram_chars.items()):
        if counts.top.get(n, 0) / len(text) > limit:
            return Rejected(document, f"gopher_repetition:top_{n}_gram")
    for n, limit in sorted(max_duplicate_n_gram_chars.items()):
        if counts.duplicate[n] / len(text) > limit:
            return Rejected(document, f"gopher_repetition:duplicate_{n}_grams")
    return document


def gopher_quality(
    document: Document,
    *,
    min_words: int | None = 50,
    max_words: int | None = 100_000,
    min_mean_word_length: float | None = 3,
    max_mean_word_length: float | None = 10,
    max_symbol_ratio: float | None = 0.1,
    max_bullet_lines: float | None = 0.9,
    max_ellipsis_lines: float | None = 0.3,
    min_alphabetic_words: float | None = 0.8,
    min_stop_words: int | None = 2,
    splitter: Splitter = DEFAULT_SPLITTER,
) -> Document | Rejected:
    """Gopher's quality rules (arXiv 2112.11446, A1.1). Lengths leave symbols out; ratios are over all words."""
    text, language = document.text, language_of(document)
    analysis = analyse(text, splitter)
    (different, _), counts, num_words = analysis.numbered, analysis.word_counts, len(analysis.words)
    has_letter, is_solid = _letters_and_symbols(different)
    reason = None
    if language not in UNSPACED_LANGUAGES:
        lengths = np.fromiter(map(len, different), np.int64, len(different))
        reason = _gopher_word_rule(
            lengths[is_solid], counts[is_solid], min_words, max_words, min_mean_word_length, max_mean_word_length
        ) or _gopher_symbol_rule(text, num_words, max_symbol_ratio)
    lines = text.splitlines()
    if reason is None and lines:
        if _above(sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines), max_bullet_lines):
            reason = "too_many_bullet_lines"
        elif _above(sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines), max_ellipsis_lines):
            reason = "too_many_ellipsis_lines"
    with_letter = int(counts[has_letter].sum()) / max(1, num_words)
    if reason is None and num_words and language not in UNSPACED_LANGUAGES and _below(with_letter, min_alphabetic_words):
        reason = "too_few_alphabetic_words"
    if reason is None and language in STOP_WORDS and _below(len(STOP_WORDS[language].intersection(different)), min_stop_words):
        reason = "too_few_stop_words"
    return document if reason is None else Rejected(document, f"gopher_quality:{reason}")


def c4(
    document: Document,
    *,
    keep_only_terminal_punctuation: bool = True,
    min_sentences: int | None = 5,
    min_words_per_line: int | None = 3,
    max_word_length: int | None = 1000,
    drop_lorem_ipsum: bool = True,
    drop_javascript_lines: bool = True,
    drop_curly_brackets: bool = True,
    drop_policy_lines: bool = True,
    strip_citations: bool = True,
    splitter: Splitter = DEFAULT_SPLITTER,
) -> Document | Rejected:
    """C4's rules (JMLR 21-140): drops lines, then documents with few sentences left. Words are what white space separates."""
    language = language_of(document)
    spaced = language not in UNSPACED_LANGUAGES
    phrases = POLICY_PHRASES.get(language, ()) if drop_policy_lines else ()
    num_sentences, kept = 0, []
    for line in document.text.splitlines():
        line = line.strip()
        words = line.split()
        if spaced and _above(len(line), max_word_length) and any(_above(len(word), max_word_length) for word in words):
            continue
        if strip_citations and "[" in line:
            line = _CITATION.sub("", line)
        if keep_only_terminal_punctuation and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if spaced and min_words_per_line is not None and len(words) < min_words_per_line:
            continue
        lower = line.lower()
        if drop_lorem_ipsum and "lorem ipsum" in lower:
            return Rejected(document, "c4:lorem_ipsum")
        if drop_javascript_lines and "javascript" in lower:
            continue
        if drop_curly_brackets and "{" in line:
            return Rejected(document, "c4:curly_bracket")
        if any(phrase in lower for phrase in phrases):
            continue
        if min_sentences is not None:
            num_sentences += len(splitter.sentences(line))
        kept.append(line)
    if min_sentences is not None and num_sentences < min_sentences:
        return Rejected(document, "c4:too_few_sentences")
    return _with_text(document, "\n".join(kept).strip())


def fineweb(
    document: Document,
    *,
    min_punctuated_lines: float | None = 0.12,
    max_short_lines: float | None = 0.67,
    short_line_length: int = 30,
    max_duplicate_line_chars: float | None = 0.01,
    max_newline_ratio: float | None = 0.3,
    splitter: Splitter = DEFAULT_SPLITTER,
) -> Document | Rejected:
    """FineWeb's own rules (arXiv 2406.17557, 3.6). Lines are the non-blank ones; newlines are counted per word."""
    text = document.text
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return Rejected(document, "fineweb:empty")
    punctuated = sum(line[-1] in _TERMINAL for line in lines) / len(lines)
    if _below(punctuated, min_punctuated_lines):
        return Rejected(document, "fineweb:few_punctuated_lines")
    if _above(sum(len(line) <= short_line_length for line in lines) / len(lines), max_short_lines):
        return Rejected(document, "fineweb:short_lines")
    newlines = text.count("\n")
    if _above(count_duplicates(lines)[1] / (len(text) - newlines), max_duplicate_line_chars):
        return Rejected(document, "fineweb:duplicate_line_chars")
    if not newlines or max_newline_ratio is None or language_of(document) in UNSPACED_LANGUAGES:
        return document
    if newlines / max(1, len(analyse(text, splitter).words)) > max_newline_ratio:
        return Rejected(document, "fineweb:list_like")
    return document


def refinedweb(
    document: Document,
    *,
    max_uppercase: float | None = 0.5,
    max_numeric: float | None = 0.999999,
    drop_social_counters: bool = True,
    min_words_per_line: int | None = 2,
    max_removed_words: float | None = 0.05,
) -> Document | Rejected:
    """RefinedWeb's line-wise corrections (arXiv 2306.01116, G.2), as DCLM's code reads them: shares are of a line's length.

    Blank lines stay. Words are what white space separates.
    """
    language = language_of(document)
    counter = _COUNTERS.get(language) if drop_social_counters else None
    spaced = language not in UNSPACED_LANGUAGES
    kept, num_words, num_removed = [], 0, 0
    for line in document.text.split("\n"):
        words = len(line.split())
        num_words += words
        bad = words > 0 and (
            _above(sum(map(str.isupper, line)) / len(line), max_uppercase)
            or _above(sum(map(str.isdigit, line)) / len(line), max_numeric)
            or (counter is not None and counter.search(line.lower()) is not None)
            or (spaced and min_words_per_line is not None and words < min_words_per_line)
        )
        if bad:
            num_removed += words
        else:
            kept.append(line)
    if num_words == num_removed:
        return Rejected(document, "refinedweb:empty")
    if _above(num_removed / num_words, max_removed_words):
        return Rejected(document, "refinedweb:too_many_words_removed")
    return _with_text(document, "\n".join(kept).strip())


_TERMINAL = frozenset(TERMINAL_PUNCTUATION)


def _paragraphs(text: str) -> list[str]:
    """What two or more newlines separate."""
    return _PARAGRAPHS.split(text) if "\n\n" in text else [text]


def _lines(text: str) -> list[str]:
    """What runs of newlines separate."""
    return _LINES.split(text) if "\n\n" in text else text.split("\n")


def _gopher_word_rule(
    lengths: np.ndarray,
    counts: np.ndarray,
    min_words: int | None,
    max_words: int | None,
    min_mean: float | None,
    max_mean: float | None,
) -> str | None:
    """lengths and counts of the different words that are not symbols."""
    num_words = int(counts.sum())
    if _below(num_words, min_words):
        return "too_few_words"
    if _above(num_words, max_words):
        return "too_many_words"
    mean = int((lengths * counts).sum()) / num_words if num_words else 0.0
    if _below(mean, min_mean):
        return "words_too_short"
    return "words_too_long" if _above(mean, max_mean) else None


def _gopher_symbol_rule(text: str, num_words: int, max_ratio: float | None) -> str | None:
    if _above(text.count("#") / max(1, num_words), max_ratio):
        return "too_many_hashes"
    if _above((text.count("...") + text.count("…")) / max(1, num_words), max_ratio):
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


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def _with_text(document: Document, text: str) -> Document:
    return document if text == document.text else replace(document, text=text)
