"""MinHash of a document: text -> word n-grams ("shingles") -> signature -> band keys.

Text is lower-cased and decomposed (NFD); accents (combining marks of Latin, Greek and Cyrillic) are dropped, a number is one
digit 0 (unless fold_numbers is false), everything that is no letter, mark or digit separates words, and each character of a
script written without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) is a word. A shingle is a 32-bit hash of n consecutive
words (of all of them in a shorter text). Number p of the signature is the smallest (a_p * shingle + b_p mod 2^64) >> 32. A band
key hashes the rows of one band; documents of Jaccard similarity s share at least one of b keys of r rows with probability
1 - (1 - s^r)^b (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from megagpt.corpus.text.characters import folded_characters, plain_characters


@dataclass(frozen=True, slots=True)
class MinHashSettings:
    """Parameters of the signatures; documents can be compared where they are equal."""

    words_per_shingle: int
    num_bands: int
    rows_per_band: int
    seed: int
    fold_numbers: bool = True
    """Numbers are equal to each other."""
    min_words: int = 1
    """Texts of fewer words have no shingles."""

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
    from megagpt.corpus.text import shingle_kernels

    normal = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    data, ends = shingle_kernels.single_spaced_texts(*_utf8_of_texts(normal))
    whole = data.data
    return [xxhash.xxh3_128_digest(whole[begin:end]) for begin, end in itertools.pairwise([0, *ends.tolist()])]


def raw_digests(texts: Sequence[str]) -> list[int]:
    """64 bits each, never 0, equal for equal texts (xxh3_64)."""
    return [xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) or 1 for text in texts]


def n_gram_hashes(text: str, size: int, *, fold_numbers: bool = True) -> np.ndarray:
    """64-bit hashes of the n-grams of a text in order, repeated ones included: uint64; empty if the text has no word."""
    from megagpt.corpus.text import shingle_kernels

    found, complete = shingle_kernels.n_grams(_utf8(text), folded_characters(fold_numbers=fold_numbers), size)
    if not complete:
        whole = unicodedata.normalize("NFD", text.lower())
        found, _ = shingle_kernels.n_grams(_utf8(whole), plain_characters(fold_numbers=fold_numbers), size)
    return found


def shingles(text: str, *, words_per_shingle: int) -> np.ndarray:
    """The shingles of a text in order: the upper halves of its n-gram hashes, uint32."""
    return shingles_of_texts([text], words_per_shingle)[0][0]


def shingles_of_texts(
    texts: Sequence[str], words_per_shingle: int, *, fold_numbers: bool = True
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The shingles of each text, which are views of all of them in one array; that array, with the end of each text's in it."""
    from megagpt.corpus.text import shingle_kernels

    folded, plain = folded_characters(fold_numbers=fold_numbers), plain_characters(fold_numbers=fold_numbers)
    found, ends, complete = shingle_kernels.shingles_of_texts(*_utf8_of_texts(texts), folded, words_per_shingle)
    each = np.split(found, ends)[:-1]
    if not complete.all():
        others = np.flatnonzero(~complete).tolist()
        whole = [unicodedata.normalize("NFD", texts[i].lower()) for i in others]
        found, ends, _ = shingle_kernels.shingles_of_texts(*_utf8_of_texts(whole), plain, words_per_shingle)
        for i, part in zip(others, np.split(found, ends)[:-1], strict=True):
            each[i] = part
        found, ends = np.concatenate(each), np.cumsum([part.size for part in each], dtype=np.int64)
    return each, found, ends


def minhash(texts: Sequence[str], settings: MinHashSettings) -> MinHash:
    """Signatures, band keys and shingles of texts."""
    from megagpt.corpus.text import shingle_kernels

    each, found, ends = shingles_of_texts(texts, settings.words_per_shingle, fold_numbers=settings.fold_numbers)
    if settings.min_words > 1:
        each = [part if _has_words(text, part, settings) else part[:0] for text, part in zip(texts, each, strict=True)]
    functions = permutations(settings.num_rows, settings.seed)
    return MinHash(*shingle_kernels.minhash_of_texts(found, ends, *functions, settings.rows_per_band), each)


def _has_words(text: str, found: np.ndarray, settings: MinHashSettings) -> bool:
    """Whether a text with these shingles has `min_words` words."""
    if found.size > 1:
        return found.size + settings.words_per_shingle > settings.min_words
    return n_gram_hashes(text, 1, fold_numbers=settings.fold_numbers).size >= settings.min_words


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
