"""C4's rules on lines and documents (JMLR 21-140). Definitions follow datatrove 0.10."""

import itertools
import re
from typing import Annotated

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, above, thresholds_and_splitter, with_text
from megagpt.corpus.text.code import code_lines
from megagpt.corpus.text.languages import UNPUNCTUATED_LANGUAGES, UNSPACED_LANGUAGES, language_of
from megagpt.corpus.text.punctuation import TERMINAL_PUNCTUATION
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter
from megagpt.documents import Document, Rejected


class C4Config(Config):
    """C4's rules: JMLR 21-140. Drops lines, then documents. null switches a rule off."""

    keep_only_terminal_punctuation: bool = True
    """Keep only lines that end in . ? ! " or ', or in an end mark of another script. The paper's rule, and its harshest;
    FineWeb leaves it out (false). Thai and Lao pass: their sentences end without a mark."""
    min_sentences: Annotated[int, Field(ge=0)] | None = 5
    """Sentences left in a document. The paper: 5; TensorFlow Datasets' code: 3 (and 5 words a line), the reverse."""
    min_words_per_line: Annotated[int, Field(ge=0)] | None = 3
    """The paper: 3; TensorFlow Datasets' code: 5."""
    max_word_length: Annotated[int, Field(ge=1)] | None = 1000
    """Lines with a longer word are dropped (the code's rule, not the paper's)."""
    drop_lorem_ipsum: bool = True
    """Refuse documents with "lorem ipsum"."""
    drop_javascript_lines: bool = True
    """Drop lines with "javascript"."""
    drop_curly_brackets: bool = True
    """Refuse documents with a curly bracket. Drops programs, too: false for corpora with code."""
    drop_policy_lines: bool = True
    """Drop lines about cookies, privacy policies and terms of use (the code's rule, not the paper's). English only."""
    strip_citations: bool = True
    """Remove [12], [edit] and [citation needed]."""
    keep_code: bool = False
    """Leave lines of code (in Markdown fences, or indented below another line) as they are. The paper's rules drop most."""


POLICY_PHRASES: dict[str, tuple[str, ...]] = {
    "en": ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
}
_ENDS = frozenset(TERMINAL_PUNCTUATION)
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")


def c4(document: Document, config: C4Config, *, splitter: Splitter = DEFAULT_SPLITTER) -> Document | Rejected:
    """C4's rules (JMLR 21-140): drops lines, then documents with few sentences left. Words are what white space separates."""
    language = language_of(document)
    spaced = language not in UNSPACED_LANGUAGES
    phrases = POLICY_PHRASES.get(language, ()) if config.drop_policy_lines else ()
    marked = language not in UNPUNCTUATED_LANGUAGES
    num_sentences, kept = 0, []
    lines = document.text.splitlines()
    is_code = [base is not None for base in code_lines(lines)] if config.keep_code else itertools.repeat(False)
    for line, keep in zip(lines, is_code, strict=False):
        if keep:
            kept.append(line)
            continue
        line = line.strip()
        words = line.split()
        too_long = spaced and above(len(line), config.max_word_length)
        if too_long and any(above(len(word), config.max_word_length) for word in words):
            continue
        if config.strip_citations and "[" in line:
            line = _CITATION.sub("", line)
        if config.keep_only_terminal_punctuation and marked and not _ends_sentence(line):
            continue
        if spaced and config.min_words_per_line is not None and len(words) < config.min_words_per_line:
            continue
        lower = line.lower()
        if config.drop_lorem_ipsum and "lorem ipsum" in lower:
            return Rejected(document, "c4:lorem_ipsum")
        if config.drop_javascript_lines and "javascript" in lower:
            continue
        if config.drop_curly_brackets and "{" in line:
            return Rejected(document, "c4:curly_bracket")
        if any(phrase in lower for phrase in phrases):
            continue
        if config.min_sentences is not None:
            num_sentences += len(splitter.sentences(line))
        kept.append(line)
    if config.min_sentences is not None and marked and num_sentences < config.min_sentences:
        return Rejected(document, "c4:too_few_sentences")
    return with_text(document, "\n".join(kept).strip())


def _ends_sentence(line: str) -> bool:
    """Whether a line ends in a mark of C4's, or in one of another script, of which closing brackets may follow."""
    if line.isascii():
        return line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...")
    last = line.rstrip("」』）】》〉")[-1:]
    return (last in _ENDS or line.endswith(('"', "'"))) and not line.endswith("...")


C4 = FilterSpec(
    C4Config,
    thresholds_and_splitter(c4),
    word_lists={"drop_policy_lines": POLICY_PHRASES},
    spaced_only=("min_words_per_line", "max_word_length"),
    punctuated_only=("keep_only_terminal_punctuation", "min_sentences"),
)
