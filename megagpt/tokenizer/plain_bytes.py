"""Bytes as tokens: 256 ids, and one for the end of text."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megagpt.tokenizer.bpe import (
    join_pieces,
)


class Bytes:
    """UTF-8 bytes are ids 0 to 255; the end of text is 256."""

    kind, vocab_size, eot_id, lossless = "bytes", 257, 256, True
    eos_ids: tuple[int, ...] = (256,)
    bos_id: int | None = None
    dummy_prefix = False
    fingerprint = hashlib.sha256(b"bytes 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return join_pieces(self.token_bytes(), ids)

    def token_bytes(self) -> list[bytes]:
        return [bytes([value]) for value in range(256)] + [b""]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "bytes.tokenizer").write_text("UTF-8 bytes as ids 0 to 255, end-of-text 256\n", encoding="utf-8")
