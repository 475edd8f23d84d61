"""U+2581, with which SentencePiece's vocabularies, and those made after them, spell a space."""

from collections.abc import Callable, Sequence

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, so the character itself must never reach it."""


def encode_around_marks(text: str, mark_ids: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a text in which every U+2581 becomes `mark_ids`, and what is between them is encoded by itself."""
    first, *rest = text.split(SPACE_MARK)
    ids = list(encode(first))
    for part in rest:
        ids += [*mark_ids, *encode(part)]
    return ids
