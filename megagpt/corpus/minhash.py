"""MinHash of a document: text -> word n-grams ("shingles") -> signature -> band keys.

Text is lower-cased and decomposed (NFD); combining marks are dropped, a number is one digit 0, everything that is no letter or
digit separates words, and each character of a script written without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) is a word. A
shingle is a 32-bit hash of n consecutive words (of all of them in a shorter text). Number p of the signature is the smallest
(a_p * shingle + b_p mod 2^64) >> 32. A band key hashes the rows of one band; documents of Jaccard similarity s share at least
one of b keys of r rows with probability 1 - (1 - s^r)^b (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

import functools
import operator
import unicodedata
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
    """What near-duplicate search keeps of a document: signature uint16 [rows], keys uint64 [bands], shingles counted."""

    signature: np.ndarray
    keys: np.ndarray
    num_shingles: int


def exact_digest(text: str) -> bytes:
    """16 bytes, equal for texts that differ in nothing but white space and Unicode form (xxh3_128 of the NFC text)."""
    from megagpt.corpus import minhash_kernels

    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(minhash_kernels.single_spaced(_utf8(text)).data)


def n_gram_hashes(text: str, size: int) -> np.ndarray:
    """64-bit hashes of the n-grams of a text in order, repeated ones included: uint64; empty if the text has no word."""
    from megagpt.corpus import minhash_kernels

    found, complete = minhash_kernels.n_grams(_utf8(text), folded_characters(), size)
    if not complete:
        whole = unicodedata.normalize("NFD", text.lower())
        found, _ = minhash_kernels.n_grams(_utf8(whole), plain_characters(), size)
    return found


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def shingles(text: str, *, words_per_shingle: int) -> np.ndarray:
    """The shingles of a text in order: the upper halves of its n-gram hashes, uint32."""
    return (n_gram_hashes(text, words_per_shingle) >> np.uint64(32)).astype(np.uint32)


def minhash(text: str, settings: MinHashSettings) -> MinHash | None:
    """Signature (the lower 16 bits of each minimum) and band keys of a text; None if the text has no word."""
    return minhash_of(shingles(text, words_per_shingle=settings.words_per_shingle), settings)


def minhash_of(found: np.ndarray, settings: MinHashSettings) -> MinHash | None:
    """The same of a text's shingles (uint32)."""
    from megagpt.corpus import minhash_kernels

    if found.size == 0:
        return None
    functions = permutations(settings.num_rows, settings.seed)
    return MinHash(*minhash_kernels.minhash(found, *functions, settings.rows_per_band), int(found.size))


def load_kernels() -> None:
    """Load what is compiled now: the worker processes of several phases, which are forked from this one, then have it."""
    from megagpt.corpus import cluster_kernels, leak_kernels  # noqa: F401

    minhash("once", MinHashSettings(words_per_shingle=5, num_bands=1, rows_per_band=1, seed=1))
    exact_digest("once")


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
