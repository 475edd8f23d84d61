"""MinHash of a document: text -> word n-grams ("shingles") -> signature -> band keys.

Text is lower-cased and decomposed (NFD); combining marks are dropped, a number is one digit 0, everything that is no letter or
digit separates words, and each character of a script written without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) is a word. A
shingle is a 32-bit hash of n consecutive words (of all of them in a shorter text). Number p of the signature is the smallest
(a_p * shingle + b_p mod 2^64) >> 32. A band key hashes the rows of one band; documents of Jaccard similarity s share at least
one of b keys of r rows with probability 1 - (1 - s^r)^b (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

import functools
import itertools
import operator
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

SEPARATOR, LETTER, DIGIT, MARK, WORD_CHARACTER = range(5)
TABLE_SIZE = 0x20000
HANGUL = (0xAC00, 0xD7A4)
"""Syllables, first and end: the kernel decomposes them."""
CLASS_SHIFT = 24
NOT_ALONE = 0xFFFFFFFF

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)


@dataclass(frozen=True, slots=True)
class MinHashSettings:
    """Parameters of the signatures; documents can be compared where they are equal."""

    words_per_shingle: int
    num_bands: int
    rows_per_band: int
    seed: int

    @property
    def num_rows(self) -> int:
        """Numbers in a signature."""
        return self.num_bands * self.rows_per_band


class MinHash(NamedTuple):
    """What near-duplicate search keeps of texts. One without words has no shingles, and numbers that mean nothing."""

    signatures: np.ndarray
    """uint16 [texts, rows]: the lower 16 bits of each minimum."""
    keys: np.ndarray
    """uint64 [texts, bands]."""
    shingles: list[np.ndarray]
    """uint32, per text in order, repeated ones included."""


def exact_digests(texts: Sequence[str]) -> list[bytes]:
    """16 bytes each, equal for texts that differ in nothing but white space and Unicode form (xxh3_128 of the NFC text)."""
    from megagpt.corpus.text import shingle_kernels as minhash_kernels

    normal = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    data, ends = minhash_kernels.single_spaced_texts(*_utf8_of_texts(normal))
    whole = data.data
    return [xxhash.xxh3_128_digest(whole[begin:end]) for begin, end in itertools.pairwise([0, *ends.tolist()])]


def n_gram_hashes(text: str, size: int) -> np.ndarray:
    """64-bit hashes of the n-grams of a text in order, repeated ones included: uint64; empty if the text has no word."""
    from megagpt.corpus.text import shingle_kernels as minhash_kernels

    found, complete = minhash_kernels.n_grams(_utf8(text), folded_characters(), size)
    if not complete:
        whole = unicodedata.normalize("NFD", text.lower())
        found, _ = minhash_kernels.n_grams(_utf8(whole), plain_characters(), size)
    return found


def shingles(text: str, *, words_per_shingle: int) -> np.ndarray:
    """The shingles of a text in order: the upper halves of its n-gram hashes, uint32."""
    return shingles_of_texts([text], words_per_shingle)[0][0]


def shingles_of_texts(texts: Sequence[str], words_per_shingle: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The shingles of each text, which are views of all of them in one array; that array, with the end of each text's in it."""
    from megagpt.corpus.text import shingle_kernels as minhash_kernels

    found, ends, complete = minhash_kernels.shingles_of_texts(*_utf8_of_texts(texts), folded_characters(), words_per_shingle)
    each = np.split(found, ends)[:-1]
    if not complete.all():
        others = np.flatnonzero(~complete).tolist()
        whole = [unicodedata.normalize("NFD", texts[i].lower()) for i in others]
        found, ends, _ = minhash_kernels.shingles_of_texts(*_utf8_of_texts(whole), plain_characters(), words_per_shingle)
        for i, part in zip(others, np.split(found, ends)[:-1], strict=True):
            each[i] = part
        found, ends = np.concatenate(each), np.cumsum([part.size for part in each], dtype=np.int64)
    return each, found, ends


def minhash(texts: Sequence[str], settings: MinHashSettings) -> MinHash:
    """Signatures, band keys and shingles of texts."""
    from megagpt.corpus.text import shingle_kernels as minhash_kernels

    each, found, ends = shingles_of_texts(texts, settings.words_per_shingle)
    functions = permutations(settings.num_rows, settings.seed)
    return MinHash(*minhash_kernels.minhash_of_texts(found, ends, *functions, settings.rows_per_band), each)


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def _utf8_of_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Their bytes one after the other, and where each ends."""
    data = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([len(item) for item in data], dtype=np.int64)


def load_kernels() -> None:
    """Load what is compiled here now: the worker processes of several phases, which are forked from this one, then have it."""
    minhash(["once"], MinHashSettings(words_per_shingle=5, num_bands=1, rows_per_band=1, seed=1))
    exact_digests(["once"])


def shingle_set(text: str, *, words_per_shingle: int) -> np.ndarray:
    """The distinct shingles of a text, ascending: uint32."""
    return distinct(shingles(text, words_per_shingle=words_per_shingle))


def distinct(found: np.ndarray) -> np.ndarray:
    """Each number once, ascending."""
    found = np.sort(found)
    return found[np.concatenate([[True], found[1:] != found[:-1]])[: found.size]]


@functools.cache
def permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b), uint64 [count] each, a odd: SplitMix64 from `seed`, so that they never change with a library's version."""
    state, values = seed & 0xFFFFFFFFFFFFFFFF, []
    for _ in range(2 * count):
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        values.append(value ^ value >> 31)
    numbers = np.array(values, np.uint64)
    return numbers[:count] | np.uint64(1), numbers[count:]


@functools.cache
def plain_characters() -> np.ndarray:
    """uint32 [TABLE_SIZE]: each code point, and above its 24 bits what it is to the word splitter."""
    categories = np.frombuffer("".join(map(unicodedata.category, map(chr, range(TABLE_SIZE)))).encode(), "S2")
    classes = np.where(
        np.isin(categories.astype("S1"), (b"L", b"N")) | (categories == b"Mc"), np.uint32(LETTER), np.uint32(SEPARATOR)
    )
    classes[np.isin(categories, (b"Mn", b"Me"))] = MARK
    classes[categories == b"Nd"] = DIGIT
    for first, last in _UNSPACED:
        part = classes[first : last + 1]
        part[part == LETTER] = WORD_CHARACTER
    return np.arange(TABLE_SIZE, dtype=np.uint32) | classes << np.uint32(CLASS_SHIFT)


@functools.cache
def folded_characters() -> np.ndarray:
    """uint32 [TABLE_SIZE]: the entry in `plain_characters` of what lower case and NFD make of a code point, without combining
    marks, where that is one character, whatever stands beside it (that of sigma depends on it); else NOT_ALONE."""
    table = plain_characters().copy()
    characters = list(map(chr, range(TABLE_SIZE)))
    folded = list(map(functools.partial(unicodedata.normalize, "NFD"), map(str.lower, characters)))
    changed = np.frombuffer(bytes(map(operator.ne, folded, characters)), bool).copy()
    changed[slice(*HANGUL)] = False
    for code in np.flatnonzero(changed):
        bases = [ord(part) for part in folded[code] if unicodedata.category(part) not in ("Mn", "Me")]
        table[code] = plain_characters()[bases[0]] if len(bases) == 1 and bases[0] < TABLE_SIZE else NOT_ALONE
    table[ord("\u03a3")] = NOT_ALONE
    # Marks that are letters to the splitter, and that NFD sorts when they follow each other. (Class 9, the viramas of Java and
    # Bali, never changes its place alone.)
    classes = np.frombuffer(bytes(map(unicodedata.combining, characters)), np.uint8)
    sorted_marks = [code for code in np.flatnonzero((classes != 0) & (classes != 9)) if unicodedata.category(chr(code)) == "Mc"]
    table[sorted_marks] = NOT_ALONE
    return table
