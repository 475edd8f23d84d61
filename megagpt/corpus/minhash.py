"""MinHash of a document: text -> word n-grams ("shingles") -> signature -> band keys.

Text is lower-cased and decomposed (NFD); combining marks are dropped, a number is one digit 0, everything that is no letter or
digit separates words, and each character of a script written without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) is a word. A
shingle is a 32-bit hash of n consecutive words (of all of them in a shorter text). Number p of the signature is the smallest
(a_p * shingle + b_p mod 2^64) >> 32. A band key hashes the rows of one band; documents of Jaccard similarity s share at least
one of b keys of r rows with probability 1 - (1 - s^r)^b (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

import functools
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

SEPARATOR, LETTER, DIGIT, MARK, WORD_CHARACTER = range(5)
TABLE_SIZE = 0x20000
FOLDED_SIZE = 0x3000
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
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(" ".join(text.split()).encode("utf-8", "surrogatepass"))


def n_gram_hashes(text: str, size: int) -> np.ndarray:
    """64-bit hashes of the n-grams of a text in order, repeated ones included: uint64; empty if the text has no word."""
    from megagpt.corpus import minhash_kernels

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    folded = minhash_kernels.folded(codes, folded_characters())
    if folded.size < codes.size:
        text = unicodedata.normalize("NFD", text.lower())
        folded = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return minhash_kernels.shingles(folded, character_classes(), size)


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
    minima = minhash_kernels.minima(found, *permutations(settings.num_rows, settings.seed))
    signature = (minima & np.uint32(0xFFFF)).astype(np.uint16)
    return MinHash(signature, minhash_kernels.band_keys(minima, settings.rows_per_band), int(found.size))


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
def character_classes() -> np.ndarray:
    """uint8 [TABLE_SIZE]: what each code point is to the word splitter. Above the table: Han to U+3FFFF, then marks."""
    categories = np.array(list(map(unicodedata.category, map(chr, range(TABLE_SIZE)))), "S2")
    table = np.where(
        np.isin(categories.astype("S1"), (b"L", b"N")) | (categories == b"Mc"), np.uint8(LETTER), np.uint8(SEPARATOR)
    )
    table[np.isin(categories, (b"Mn", b"Me"))] = MARK
    table[categories == b"Nd"] = DIGIT
    for first, last in _UNSPACED:
        part = table[first : last + 1]
        part[part == LETTER] = WORD_CHARACTER
    return table


@functools.cache
def folded_characters() -> np.ndarray:
    """uint32 [FOLDED_SIZE]: what lower case and NFD make of a code point, without combining marks, where that is one character,
    whatever stands beside it (that of sigma depends on it); else NOT_ALONE."""
    table = np.arange(FOLDED_SIZE, dtype=np.uint32)
    for code in range(FOLDED_SIZE):
        character = chr(code)
        folded = unicodedata.normalize("NFD", character.lower())
        if folded == character:
            continue
        bases = [part for part in folded if unicodedata.category(part) not in ("Mn", "Me")]
        table[code] = ord(bases[0]) if len(bases) == 1 and character != "\u03a3" else NOT_ALONE
    return table
