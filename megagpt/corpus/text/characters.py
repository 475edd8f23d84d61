"""The role of each character in the words of shingles: tables over code points, for the kernels.

An entry is a code point, and above its 24 bits one of SEPARATOR, LETTER, DIGIT, MARK, WORD_CHARACTER, EXPANSION. Accents (MARK)
are the combining marks of Latin, Greek and Cyrillic. The marks of all other scripts are part of the word: vowel signs and
viramas (Indic, Thai, Khmer), vowel points (Arabic, Hebrew), hamza, voicing marks (Kana). Without them another word would stand
there.
"""

import functools
import operator
import unicodedata
from typing import NamedTuple

import numpy as np

SEPARATOR, LETTER, DIGIT, MARK, WORD_CHARACTER, EXPANSION = range(6)
TABLE_SIZE = 0x20000
HANGUL = (0xAC00, 0xD7A4)
"""Syllables, first and end: the kernel decomposes them."""
CLASS_SHIFT = 24
NOT_ALONE = 0xFFFFFFFF
MAX_EXPANSION = 4
"""Most entries that one character becomes."""

_ACCENTS = (
    (0x0300, 0x036F),  # Combining diacritical marks, with the extended and supplementary ones and those for symbols
    (0x0483, 0x0489),  # Cyrillic
    (0x1AB0, 0x1AFF),
    (0x1DC0, 0x1DFF),
    (0x20D0, 0x20FF),
    (0x2DE0, 0x2DFF),  # Cyrillic letters above
    (0xA66F, 0xA69F),
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFE20, 0xFE2F),
)
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)


class Characters(NamedTuple):
    """The tables of the kernels; code points from TABLE_SIZE on are words, or marks."""

    entries: np.ndarray
    """uint32 [TABLE_SIZE]. Of an EXPANSION the lower bits are a row of `expansions`."""
    expansions: np.ndarray
    """uint32 [rows, MAX_EXPANSION]: the entries that a character becomes, 0 where there are fewer."""
    orders: np.ndarray
    """uint8 [TABLE_SIZE]: canonical combining class, by which NFD sorts, of the marks that are part of the word; all 0 for
    texts that are in this order."""


@functools.cache
def plain_characters(*, fold_numbers: bool = True) -> Characters:
    """Of lower-case text in NFD: each code point, and above its 24 bits what it is to the word splitter. Digits are letters
    unless numbers are folded."""
    categories = np.frombuffer("".join(map(unicodedata.category, map(chr, range(TABLE_SIZE)))).encode(), "S2")
    is_letter = np.isin(categories.astype("S1"), (b"L", b"N", b"M"))
    classes = np.where(is_letter, np.uint32(LETTER), np.uint32(SEPARATOR))
    for first, last in _ACCENTS:
        part = classes[first : last + 1]
        part[np.isin(categories[first : last + 1], (b"Mn", b"Me"))] = MARK
    for first, last in _UNSPACED:
        part = classes[first : last + 1]
        part[part == LETTER] = WORD_CHARACTER
    classes[categories == b"Nd"] = DIGIT if fold_numbers else LETTER
    entries = np.arange(TABLE_SIZE, dtype=np.uint32) | classes << np.uint32(CLASS_SHIFT)
    return Characters(entries, np.zeros((1, MAX_EXPANSION), np.uint32), np.zeros(TABLE_SIZE, np.uint8))


@functools.cache
def folded_characters(*, fold_numbers: bool = True) -> Characters:
    """What lower case and NFD make of a code point, without accents: its entry in `plain_characters`, or an EXPANSION to
    several; NOT_ALONE where what stands beside it decides (sigma), or the character becomes marks alone."""
    plain = plain_characters(fold_numbers=fold_numbers).entries
    table, rows = plain.copy(), [[0] * MAX_EXPANSION]
    characters = list(map(chr, range(TABLE_SIZE)))
    orders = np.frombuffer(bytes(map(unicodedata.combining, characters)), np.uint8).copy()
    orders[plain >> CLASS_SHIFT == MARK] = 0
    folded = list(map(functools.partial(unicodedata.normalize, "NFD"), map(str.lower, characters)))
    changed = np.frombuffer(bytes(map(operator.ne, folded, characters)), bool).copy()
    changed[slice(*HANGUL)] = False
    for code in np.flatnonzero(changed):
        parts = [ord(part) for part in folded[code]]
        if max(parts) >= TABLE_SIZE or orders[parts[0]]:
            table[code] = NOT_ALONE
            continue
        kept = [part for part in parts if plain[part] >> CLASS_SHIFT != MARK]
        if len(kept) == 1:
            table[code] = plain[kept[0]]
        elif 2 <= len(kept) <= MAX_EXPANSION:
            table[code] = len(rows) | EXPANSION << CLASS_SHIFT
            rows.append([int(plain[part]) for part in kept] + [0] * (MAX_EXPANSION - len(kept)))
        else:
            table[code] = NOT_ALONE
    table[ord("\u03a3")] = NOT_ALONE
    return Characters(table, np.array(rows, np.uint32), orders)
