"""U+2581, which stands for a space in vocabularies of SentencePiece and of tokenizers derived from it."""

from collections.abc import Callable, Sequence

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, so a text's own U+2581 must never reach it."""


def encode_around_marks(text: str, mark_ids: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a text: every U+2581 gives `mark_ids`, and the text between two of them is encoded separately by `encode`."""
    first, *rest = text.split(SPACE_MARK)
    ids = list(encode(first))
    for part in rest:
        ids += [*mark_ids, *encode(part)]
    return ids
