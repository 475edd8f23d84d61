"""SentencePiece models: encode and decode with any, and train a lossless one.

Every tokenizer that is `lossless` keeps two promises: decode(encode(s)) == s for every string, and no text is encoded as a
special token (a literal `<|endoftext|>` in a document stays text). The libraries keep neither by default.
"""

import io
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megagpt.config import UserError
from megagpt.files import atomic_path
from megagpt.tokenizer.bpe import copy_files, files_fingerprint, join_pieces
from megagpt.tokenizer.space_mark import SPACE_MARK, encode_around_marks
from megagpt.tokenizer.special_ids import read_special_ids


class SentencePiece:
    """A SentencePiece model. U+2581 is encoded as its three bytes, because the model cannot tell it from a space."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from None
        pieces = self._model.get_piece_size()
        eot_id = self._model.eos_id() if self._model.eos_id() >= 0 else pieces
        self.vocab_size = max(pieces, eot_id + 1)
        special = read_special_ids(path.parent, eot_id, self.vocab_size)
        self.eot_id, self.eos_ids, self.bos_id = special.eot_id, special.eos_ids, special.bos_id
        self.fingerprint = files_fingerprint(self.kind, [path, *special.files])
        self.path, self._special_files = path, special.files
        self.dummy_prefix = join_pieces(self._pieces, self._model.encode("a")) == " a"
        self._byte_ids = {self._pieces[i][0]: i for i in range(pieces) if self._model.is_byte(i)}
        # Other models may rewrite text (NFKC, dropped spaces, a space put in front) and are then not lossless.
        probe = "  \ufb01 a\u3000\u00bd\n\n\tb  "
        decoded = join_pieces(self._pieces, self.encode(probe))
        self.lossless = len(self._byte_ids) == 256 and decoded == probe

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or not self._byte_ids:
            return self._model.encode(text)
        mark = [self._byte_ids[value] for value in SPACE_MARK.encode("utf-8")]
        return encode_around_marks(text, mark, self._model.encode)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(SPACE_MARK in text for text in texts):
            return [np.asarray(self.encode(text), np.uint32) for text in texts]
        return [np.asarray(ids, np.uint32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        text = join_pieces(self._pieces, ids)
        return text.removeprefix(" ") if self.dummy_prefix else text

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def id_of(self, piece: str) -> int | None:
        """The id of a piece by its name in the model (such as `</s>`); None if there is none."""
        i = self._model.piece_to_id(piece)
        return i if self._model.id_to_piece(i) == piece else None

    def special_names(self) -> dict[str, int]:
        """Name -> id of every control piece, such as `</s>`."""
        model = self._model
        return {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)}

    def save(self, directory: Path) -> None:
        copy_files(self._special_files, directory)
        if self.path.resolve() != (directory / "tokenizer.model").resolve():
            shutil.copyfile(self.path, directory / "tokenizer.model")

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
    """Train a lossless SentencePiece model and write it to `directory`/tokenizer.model: identity normalisation, byte fallback,
    no space put in front, none removed. A newline is a separate token, so no piece spans lines. `</s>` is the end of text.

    The same texts in the same order give the same file. Raises UserError if `vocab_size` does not suit the texts.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.replace(SPACE_MARK, "").split("\n") if line)
    # Written to memory: the trainer stores a file's name in the model, so that equal models would differ.
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
            # Sums are split over threads, so a different number would give a different unigram model.
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
"""SentencePiece silently skips training lines longer than its limit (4,192 by default), so longer lines are cut here."""


def _cut(line: str) -> Iterable[str]:
    step = _MAX_LINE_BYTES // 4
    return (line[i : i + step] for i in range(0, len(line), step))
