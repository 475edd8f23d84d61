"""What each character is to the words of shingles: tables over code points, for the kernels.

An entry is a code point, and above its 24 bits one of SEPARATOR, LETTER, DIGIT, MARK, WORD_CHARACTER.
"""

import functools
import operator
import unicodedata

import numpy as np

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
