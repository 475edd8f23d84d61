"""The interface of every tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back. `fingerprint` is a sha256 of the files (and kind): equal fingerprints mean equal ids."""

    kind: str
    vocab_size: int
    eot_id: int
    """Ends every document of a corpus."""
    eos_ids: tuple[int, ...]
    """Each of them ends a generated text; eot_id is the first."""
    bos_id: int | None
    """Begins every document and every prompt; None = nothing does."""
    dummy_prefix: bool
    """Whether a space is put in front of every text (Llama 1 and 2), so that text at the start of a document loses it again."""
    fingerprint: str
    lossless: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as a uint32 array; faster than `encode` one by one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The whole text of ids; special ones give nothing, bytes that are no UTF-8 give U+FFFD."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, b"" for special ones: decoding is joining these (less a dummy prefix)."""
        ...

    def save(self, directory: Path) -> None:
        """Copy what `open_tokenizer(directory)` needs into a directory."""
        ...


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What a model is given to continue a text that begins a document: the begin-of-text id if there is one, and the text.

    Of an empty text without such an id the end of the document before it, so there is always one id.
    """
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eot_id]


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: how many bytes of text each id stands for, 0 for special ones."""
    return np.array([len(piece) for piece in tokenizer.token_bytes()], np.int64)
