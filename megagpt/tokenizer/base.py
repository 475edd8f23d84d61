"""The interface of every tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Turns text into ids and back. `fingerprint` is a sha256 of its files and kind: equal fingerprints mean equal ids."""

    kind: str
    vocab_size: int
    eot_id: int
    """Ends every document of a corpus."""
    eos_ids: tuple[int, ...]
    """Each of them ends a generated text; eot_id is the first."""
    bos_id: int | None
    """Begins every document and every prompt; None = there is no such id."""
    dummy_prefix: bool
    """Whether `encode` puts a space in front of every text (Llama 1 and 2), which `decode` removes again."""
    fingerprint: str
    lossless: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as a uint32 array; faster than separate calls of `encode`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ids give no text, bytes that are not UTF-8 give U+FFFD."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, b"" for special ids: their concatenation, without a dummy prefix, is the decoded text."""
        ...

    def save(self, directory: Path) -> None:
        """Copy what `open_tokenizer(directory)` needs into a directory."""
        ...


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt for a text that begins a document: the begin-of-text id if the tokenizer has one, and the text's ids.

    Without such an id, an empty text gives the end-of-text id of the document before it, so there is always at least one id.
    """
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eot_id]


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: bytes of text of each id, 0 for special ids."""
    return np.array([len(piece) for piece in tokenizer.token_bytes()], np.int64)
