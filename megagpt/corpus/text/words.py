"""What the filters count in a text: words, sentences, repeated lines and repeated n-grams, analysed once per text.

The words of a text are found by a `Splitter`. The default one is our own regular expression, close to Penn and spaCy tokens:
punctuation marks are words, clitics stand alone ("don't" is "do", "n't"), numbers and initials stay whole. Whoever wants
another package's verdicts to the letter passes its word and sentence functions instead; every rule then counts with them.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np

TOP_N_GRAMS = (2, 3, 4)
REPEATED_N_GRAMS = (5, 6, 7, 8, 9, 10)


def _combining_marks() -> str:
    """Combining marks for a character class: words of many scripts contain them, and `\\w` does not."""
    return "".join(chr(code) for code in range(0x300, 0xAC00) if unicodedata.category(chr(code))[0] == "M")


_WORDS = r"""
    (?:https?://|www\.)\S*[^\s.,;:!?"')\]]      # a URL is one word
    | (?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+  # so is an e-mail address
    | (?:[^\W\d_]\.){2,}                        # U.S., e.g.
    | \d+(?:[.,:]\d+)*                          # 1,234.5 and 12:30
    | [nN]['’][tT]\b | ['’](?:[sdmSDM]|re|ve|ll|RE|VE|LL)\b   # clitics
    | [^\W\d]+?(?=[nN]['’][tT]\b)
    | [\wMARKS]+
    | \.{2,} | …                                # an ellipsis is one word
    | --+ | ==+ | \*\*+ | __+ | \#\#+            # so is a rule
    | [^\w\s]
    """
_SENTENCE_END = re.compile(r"(?:(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？｡．।॥۔؟፧።។៕။]+)\s*")


def split_words(text: str) -> list[str]:
    """The words of a text, punctuation marks included, none with white space in it."""
    return list(itertools.chain.from_iterable(map(_PIECES.__getitem__, text.split())))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text: cut after terminal punctuation that white space or the end follows."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts = [0, *ends]
    pieces = [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece.strip()]


@cache
def _word(*, with_at: bool) -> re.Pattern[str]:
    """A word in a token. Where there is no @, e-mail addresses are left out of the pattern: to look for an @ behind every
    letter takes time with the square of a token's length."""
    lines = (line for line in _WORDS.splitlines(True) if with_at or "e-mail" not in line)
    return re.compile("".join(lines).replace("MARKS", _combining_marks()), re.VERBOSE)


_MARKS_BEHIND_WORDS = frozenset(',.;:!?)]"”')
"""Behind letters alone these are words of their own: so it is known without the pattern, which is slower."""


class _Pieces(dict[str, tuple[str, ...]]):
    """The words in each token that was met lately: looked up without a Python call per token."""

    def __missing__(self, token: str) -> tuple[str, ...]:
        if len(self) >= 1 << 17:
            self.clear()
        if token.isalpha():
            words = (token,)
        elif token[-1] in _MARKS_BEHIND_WORDS and token[:-1].isalpha():
            words = (token[:-1], token[-1])
        else:
            words = tuple(_word(with_at="@" in token).findall(token))
        self[token] = words
        return words


_PIECES = _Pieces()


@dataclass(frozen=True, slots=True)
class Splitter:
    """How words and sentences are found."""

    words: Callable[[str], list[str]] = split_words
    sentences: Callable[[str], list[str]] = split_sentences


DEFAULT_SPLITTER = Splitter()


@dataclass(frozen=True)
class Analysis:
    """A text with what several rules ask about it, each computed at most once."""

    text: str
    splitter: Splitter = DEFAULT_SPLITTER

    @cached_property
    def numbered(self) -> tuple[list[str], np.ndarray]:
        """(the different words, number in that list of each word of the text, int64)."""
        if self.splitter.words is split_words:
            return number_split_words(self.text)
        return number_words(self.splitter.words(self.text))

    @property
    def num_words(self) -> int:
        return self.numbered[1].size

    @cached_property
    def word_counts(self) -> np.ndarray:
        """How often each of the different words occurs: int64."""
        different, numbers = self.numbered
        return np.bincount(numbers, minlength=len(different))

    @cached_property
    def repeated_n_grams(self) -> "NGramCounts":
        different, numbers = self.numbered
        # Each character of a token is in one of its words, if the words are our own.
        own = self.splitter.words is split_words
        words = self.text.split() if own else map(different.__getitem__, numbers.tolist())
        return count_repeated_n_grams("".join(words), different, numbers)


@lru_cache(maxsize=4)
def analyse(text: str, splitter: Splitter = DEFAULT_SPLITTER) -> Analysis:
    """The analysis of a text. The last few are kept, so that consecutive filters of one document share it."""
    return Analysis(text, splitter)


@dataclass(frozen=True, slots=True)
class NGramCounts:
    """Characters in repeated n-grams, by n. `top`: length of the most frequent n-gram, spaces included, times its count."""

    top: dict[int, int]
    duplicate: dict[int, int]


def number_words(words: list[str]) -> tuple[list[str], np.ndarray]:
    """(the different words in order of first occurrence, number in that list of each word, int64)."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return list(numbers), np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))


def number_split_words(text: str) -> tuple[list[str], np.ndarray]:
    """`number_words` of the text's `split_words`, the different words in another order. A compiled loop finds most of them."""
    from megagpt.corpus.text import word_kernels

    numbers, words, others = word_kernels.number_plain_words(_code_points(text))
    different = [text[begin:end] for begin, end in words.tolist()]
    if not len(others):
        return different, numbers
    tokens = [_PIECES[text[begin:end]] for begin, end in others.tolist()]
    number_of = {word: number for number, word in enumerate(different)}
    rest = [number_of.setdefault(word, len(number_of)) for words in tokens for word in words]
    counts = np.ones(numbers.size, np.int64)
    counts[numbers < 0] = [len(words) for words in tokens]
    numbers = np.repeat(numbers, counts)
    numbers[numbers < 0] = rest
    return list(number_of), numbers


def count_repeated_n_grams(unspaced: str, different: list[str], numbers: np.ndarray) -> NGramCounts:
    """Gopher's n-gram counts (arXiv 2112.11446, Table A1) as datatrove reads them, of a text's words joined without spaces, its
    different words, and the number in that list of each word (int64).

    top[n]: of the most frequent n-gram (the first one among equals) the space-joined length times its count; absent where
    there is no n-gram. duplicate[n]: going from left to right, the unspaced length of every n-gram seen before, advancing by n
    after a hit and by 1 otherwise; two n-grams are the same when their unspaced joins are.
    """
    if not numbers.size:
        return NGramCounts({}, dict.fromkeys(REPEATED_N_GRAMS, 0))
    from megagpt.corpus.text import ngram_kernels

    lengths = np.fromiter(map(len, different), np.int64, len(different))
    starts = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(lengths[numbers], out=starts[1:])
    top = {n: int(ngram_kernels.top_n_gram(numbers, starts, n)) for n in TOP_N_GRAMS if numbers.size >= n}
    duplicate = ngram_kernels.duplicate_n_grams(_code_points(unspaced), starts, np.array(REPEATED_N_GRAMS, np.int64))
    return NGramCounts(top, dict(zip(REPEATED_N_GRAMS, duplicate.tolist(), strict=True)))


def count_duplicates(items: Iterable[str]) -> tuple[int, int]:
    """(how many items occurred before, their characters)."""
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        if item in seen:
            count += 1
            characters += len(item)
        else:
            seen.add(item)
    return count, characters


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
