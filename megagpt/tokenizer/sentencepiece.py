"""Tokenizers behind one interface: plain bytes, SentencePiece models (trained here too) and GPT-2-style byte-level BPE.

Two promises hold for all that `open_tokenizer` calls lossless: decode(encode(s)) == s for every string, and special tokens
never come out of text (a literal `<|endoftext|>` in a document stays text). Neither is what the libraries do by default.
"""

import hashlib
import io
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from megagpt.config import UserError
from megagpt.files import atomic_path
from megagpt.tokenizer.bpe import (
    BytePairs,
    Encoder,
    files_fingerprint,
    join_pieces,
    ranks_from_merges,
    ranks_from_tiktoken,
    ranks_from_tokenizer_json,
)

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, so the character itself must never reach it."""


class Tokenizer(Protocol):
    """Text to ids and back. `fingerprint` is a sha256 of the files (and kind): equal fingerprints mean equal ids."""

    kind: str
    vocab_size: int
    eot_id: int
    fingerprint: str
    lossless: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as a uint32 array; faster than `encode` one by one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones give nothing, bytes that are no UTF-8 give U+FFFD."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, b"" for special ones: decoding is joining these."""
        ...

    def save(self, directory: Path) -> None:
        """Copy what `open_tokenizer(directory)` needs into a directory."""
        ...


def open_tokenizer(path: str | Path, encoder: Encoder = "tiktoken") -> Tokenizer:
    """Open a tokenizer: the word `bytes`, a SentencePiece `.model`, a `.tiktoken` rank file, a `tokenizer.json` of byte-level
    BPE, or a directory with one of these or with `encoder.json` and `vocab.bpe`. Raises UserError that says what was expected.

    `encoder` is the library that encodes batches of byte-level BPE; ids do not depend on it.
    """
    if str(path) == "bytes":
        return Bytes()
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, encoder)
    if not path.is_file():
        raise UserError(f"tokenizer {path}: no such file or directory (or the word bytes)")
    if path.name == "bytes.tokenizer":
        return Bytes()
    if path.suffix == ".model":
        return SentencePiece(path)
    if path.suffix == ".tiktoken":
        return BytePairs(ranks_from_tiktoken(path), [path], encoder)
    if path.name in ("encoder.json", "vocab.json"):
        return _open_directory(path.parent, encoder)
    if path.suffix == ".json":
        return BytePairs(ranks_from_tokenizer_json(path), [path], encoder)
    raise UserError(f"tokenizer {path}: known are `bytes`, *.model, *.tiktoken, tokenizer.json, encoder.json with vocab.bpe")


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: how many bytes of text each id stands for, 0 for special ones."""
    return np.array([len(piece) for piece in tokenizer.token_bytes()], np.int64)


class Bytes:
    """UTF-8 bytes as ids 0 to 255, end-of-text 256."""

    kind, vocab_size, eot_id, lossless = "bytes", 257, 256, True
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


class SentencePiece:
    """A SentencePiece model. U+2581, which it cannot tell from a space, is passed by as its three bytes."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from None
        pieces = self._model.get_piece_size()
        self.eot_id = self._model.eos_id() if self._model.eos_id() >= 0 else pieces
        self.vocab_size = max(pieces, self.eot_id + 1)
        self.fingerprint = files_fingerprint(self.kind, [path])
        self._path = path
        self._byte_ids = {self._pieces[i][0]: i for i in range(pieces) if self._model.is_byte(i)}
        # A model made elsewhere may rewrite text (NFKC, dropped spaces, a space put in front): then it is not lossless.
        probe = "  \ufb01 a\u3000\u00bd\n\n\tb  "
        self.lossless = len(self._byte_ids) == 256 and self.decode(self.encode(probe)) == probe

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or not self._byte_ids:
            return self._model.encode(text)
        mark = [self._byte_ids[value] for value in SPACE_MARK.encode("utf-8")]
        first, *rest = text.split(SPACE_MARK)
        ids = list(self._model.encode(first))
        for part in rest:
            ids += mark + self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(SPACE_MARK in text for text in texts):
            return [np.asarray(self.encode(text), np.uint32) for text in texts]
        return [np.asarray(ids, np.uint32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return join_pieces(self._pieces, ids)

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self._path.resolve() != (directory / "tokenizer.model").resolve():
            shutil.copyfile(self._path, directory / "tokenizer.model")

    @cached_property
    def _pieces(self) -> list[bytes]:
        model = self._model
        pieces = [b""] * self.vocab_size
        for i in range(model.get_piece_size()):
            if model.is_byte(i):
                pieces[i] = bytes([int(model.id_to_piece(i)[3:5], 16)])
            elif model.is_unknown(i):
                pieces[i] = "\ufffd".encode()
            elif not model.is_control(i):
                pieces[i] = model.id_to_piece(i).replace(SPACE_MARK, " ").encode("utf-8")
        return pieces


def train_sentencepiece(
    texts: Iterable[str],
    directory: Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    split_digits: bool = True,
    character_coverage: float = 0.9999,
) -> SentencePiece:
    """Train a lossless SentencePiece model into `directory`/tokenizer.model: identity normalisation, byte fallback, no space
    put in front, none removed. Newlines are a token of their own, so no piece spans lines. `</s>` is the end-of-text token.

    The same texts in the same order give the same file. Raises UserError if `vocab_size` does not suit the texts.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.replace(SPACE_MARK, "").split("\n") if line)
    # Written to memory: given a file's name the trainer would store that name in the model, and equal models would differ.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for line in lines for piece in _cut(line)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=split_digits,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            max_sentence_length=_MAX_LINE_BYTES,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            # Sums are split over threads, so another number would give another unigram model.
            num_threads=16,
            train_extremely_large_corpus=model_type == "unigram",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"tokenizer: vocab_size={vocab_size}: SentencePiece cannot train it: {error}") from None
    with atomic_path(directory / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePiece(directory / "tokenizer.model")


_MAX_LINE_BYTES = 1 << 16
"""SentencePiece silently skips training lines above its limit (4,192 by default), so longer ones are cut here."""


def _cut(line: str) -> Iterable[str]:
    step = _MAX_LINE_BYTES // 4
    return (line[i : i + step] for i in range(0, len(line), step))


def _open_directory(directory: Path, encoder: Encoder) -> Tokenizer:
    if (directory / "bytes.tokenizer").is_file():
        return Bytes()
    models = sorted(directory.glob("*.model"))
    ranks = sorted(directory.glob("*.tiktoken"))
    if len(models) > 1 or (not models and len(ranks) > 1):
        raise UserError(f"tokenizer {directory}: several models in it ({models[:2] or ranks[:2]}): name the file")
    if models:
        return SentencePiece(models[0])
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        files = [directory / vocabulary, directory / merges]
        if all(file.is_file() for file in files):
            return BytePairs(ranks_from_merges(*files), files, encoder)
    if (directory / "tokenizer.json").is_file():
        return BytePairs(ranks_from_tokenizer_json(directory / "tokenizer.json"), [directory / "tokenizer.json"], encoder)
    if ranks:
        return BytePairs(ranks_from_tiktoken(ranks[0]), ranks, encoder)
    raise UserError(f"tokenizer {directory}: holds no *.model, tokenizer.json, *.tiktoken, nor encoder.json with vocab.bpe")
