"""Read a tokenizer.json with Hugging Face's `tokenizers`, if tiktoken cannot express it (byte fallback, normalizers).

The ids are those of that library with `add_special_tokens=False`, with two exceptions that keep our guarantees: the name of a
special token stays text, and U+2581 is encoded as its three bytes, because models that spell a space with it cannot tell it
from a space. Added tokens that are not special are vocabulary (GPT-NeoX's runs of spaces).
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.tokenizer.bpe import EOT_NAMES, byte_characters, copy_files, files_fingerprint, join_pieces, probe_texts
from megagpt.tokenizer.reading import Reading, write_reading
from megagpt.tokenizer.space_mark import SPACE_MARK, encode_around_marks
from megagpt.tokenizer.special_ids import read_special_ids

_PROBE = (
    "  \ufb01 a\u3000\u00bd\n\n\tb  ",
    "e\u0301 A\u030a \u1100\u1161",
    " don't  do \r\n that . , ! \x00\u00ad\u200b",
    "日本語 🎉",
)


class HuggingFaceTokenizer:
    """Any tokenizer.json whose decoder is byte-level, byte fallback or Metaspace. `lossless` says whether test strings from all
    of Unicode are decoded unchanged; `losses` names the parts that may rewrite text."""

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        # Workers are processes, and threads do not survive a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        try:
            self._fast = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error})") from None
        value = read_json(path)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self.path, self._value = path, value
        self._added = {token["id"]: token for token in value.get("added_tokens", [])}
        special = {token["content"]: i for i, token in self._added.items() if token["special"]}
        names = self._fast.get_vocab(with_added_tokens=True)
        self._ids = names
        size = max(names.values(), default=-1) + 1
        eot_id = next((special[name] for name in EOT_NAMES if name in special), size)
        self.vocab_size = max(size, eot_id + 1)
        found = read_special_ids(path.parent, eot_id, self.vocab_size)
        self.eot_id, self.eos_ids, self.bos_id, self._special_files = found.eot_id, found.eos_ids, found.bos_id, found.files
        self.fingerprint = files_fingerprint(self.kind, [path, *found.files])
        self._special_ids = frozenset({*special.values(), eot_id})
        self._mark_ids = self._bytes_of_mark()
        self.dummy_prefix = join_pieces(self._pieces, self.encode("a")) == " a"
        for name in special:
            if not self._special_ids.isdisjoint(self.encode(name)):
                raise UserError(f"tokenizer {path}: the text {name!r} is encoded as a special id: the two cannot be told apart")
        self.lossless = all(join_pieces(self._pieces, self.encode(text)) == text for text in (*_PROBE, *probe_texts()))

    @property
    def losses(self) -> str:
        """The parts of the file that may rewrite text, for messages: normalizers, a space put in front, missing bytes."""
        names = [step["type"] for step in _steps(self._value.get("normalizer"), "normalizers")]
        if self.dummy_prefix:
            names.append("a space put in front")
        return ", ".join(names) or "characters that have no id"

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or not self._mark_ids:
            return self._ids_of(text)
        return encode_around_marks(text, self._mark_ids, self._ids_of)

    def _ids_of(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._mark_ids and any(SPACE_MARK in text for text in texts):
            return [np.asarray(self.encode(text), np.uint32) for text in texts]
        found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        text = join_pieces(self._pieces, ids)
        return text.removeprefix(" ") if self.dummy_prefix else text

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def id_of(self, piece: str) -> int | None:
        """The id of a token by its name (such as `</s>`); None if there is none."""
        return self._ids.get(piece)

    def save(self, directory: Path) -> None:
        copy_files(self._special_files, directory)
        if self.path.resolve() != (directory / "tokenizer.json").resolve():
            shutil.copyfile(self.path, directory / "tokenizer.json")
        write_reading(directory, Reading(library="tokenizers"))

    def _bytes_of_mark(self) -> list[int]:
        """The ids of U+2581's three bytes if the vocabulary spells spaces with it and has single bytes, else []."""
        names = [f"<0x{value:02X}>" for value in SPACE_MARK.encode()]
        if _decoder_kind(self._value, self.path) == "bytes" or any(name not in self._ids for name in names):
            return []
        return [self._ids[name] for name in names]

    @cached_property
    def _pieces(self) -> list[bytes]:
        kind = _decoder_kind(self._value, self.path)
        to_bytes = byte_characters()
        fallback = {f"<0x{value:02X}>": bytes([value]) for value in range(256)} if kind == "fallback" else {}
        unknown = self._value["model"].get("unk_token")
        pieces = [b""] * self.vocab_size
        for name, i in self._ids.items():
            added = self._added.get(i)
            if added is not None:
                pieces[i] = b"" if added["special"] else name.encode()
            elif name == unknown:
                pieces[i] = "\ufffd".encode()
            elif kind == "bytes":
                known = all(character in to_bytes for character in name)
                pieces[i] = bytes(map(to_bytes.__getitem__, name)) if known else name.encode()
            else:
                pieces[i] = fallback.get(name) or name.replace(SPACE_MARK, " ").encode()
        return pieces


def _decoder_kind(value: dict[str, Any], path: Path) -> str:
    """How ids become text: "bytes" (GPT-2's characters for bytes), "fallback" (spaces as U+2581, bytes as <0x0A>), "spaces"."""
    kinds = [step["type"] for step in _steps(value.get("decoder"), "decoders")]
    if kinds == ["ByteLevel"]:
        return "bytes"
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and {"Replace", "Metaspace"} & set(kinds):
        return "fallback" if "ByteFallback" in kinds or value["model"].get("byte_fallback") else "spaces"
    raise UserError(
        f"tokenizer {path}: decoder {kinds or None} is not supported: ids must stand for bytes of text (ByteLevel, Metaspace, "
        "or Replace with ByteFallback)"
    )


def _steps(value: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, which is one step or a sequence of them."""
    return [] if value is None else value.get(name, [value])
