"""Tokenizers behind one interface: plain bytes, SentencePiece models (trained here too) and GPT-2-style byte-level BPE.

Two promises hold for all that `open_tokenizer` calls lossless: decode(encode(s)) == s for every string, and special tokens
never come out of text (a literal `<|endoftext|>` in a document stays text). Neither is what the libraries do by default.
"""

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megagpt.config import UserError
from megagpt.files import atomic_path

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 cuts text before merging: `pat` in OpenAI's encoder.py, as tiktoken's r50k_base spells it."""
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<|im_end|>")
"""Names under which published vocabularies carry their end-of-text token, the first found is taken."""
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


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: the word `bytes`, a SentencePiece `.model`, a `.tiktoken` rank file, a `tokenizer.json` of byte-level
    BPE, or a directory with one of these or with `encoder.json` and `vocab.bpe`. Raises UserError that says what was expected.
    """
    if str(path) == "bytes":
        return Bytes()
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise UserError(f"tokenizer {path}: no such file or directory (or the word bytes)")
    if path.name == "bytes.tokenizer":
        return Bytes()
    if path.suffix == ".model":
        return SentencePiece(path)
    if path.suffix == ".tiktoken":
        return BytePairs(_ranks_from_tiktoken(path), [path])
    if path.name in ("encoder.json", "vocab.json"):
        return _open_directory(path.parent)
    if path.suffix == ".json":
        return BytePairs(_ranks_from_tokenizer_json(path), [path])
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
        return _join(self.token_bytes(), ids)

    def token_bytes(self) -> list[bytes]:
        return [bytes([value]) for value in range(256)] + [b""]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "bytes.tokenizer").write_text("UTF-8 bytes as ids 0 to 255, end-of-text 256\n", encoding="utf-8")


class BytePairs:
    """GPT-2-style byte-level BPE, encoded by tiktoken's `encode_ordinary`: exact, and the only one of six libraries tried that
    leaves a literal `<|endoftext|>` text."""

    kind = "bpe"
    lossless = True

    def __init__(self, vocabulary: "Vocabulary", files: list[Path]) -> None:
        import tiktoken

        self.eot_id, self.vocab_size = vocabulary.eot_id, vocabulary.size
        self.fingerprint = _fingerprint(self.kind, files)
        self._ranks, self._files = vocabulary.ranks, files
        self._encoding = tiktoken.Encoding(
            "megagpt", pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._encoding.encode_ordinary(text), np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _join(self._pieces, ids)

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def save(self, directory: Path) -> None:
        _copy(self._files, directory)

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for piece, rank in self._ranks.items():
            pieces[rank] = piece
        return pieces


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
        self.fingerprint = _fingerprint(self.kind, [path])
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
        return _join(self._pieces, ids)

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


class Vocabulary:
    """A byte-level BPE: bytes -> rank (rank is the id and the merge order), the pre-split pattern, and the end-of-text id."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, eot_id: int | None = None, size: int = 0) -> None:
        self.ranks, self.pattern = ranks, pattern
        self.eot_id = max(ranks.values()) + 1 if eot_id is None else eot_id
        self.size = max(size, self.eot_id + 1, max(ranks.values()) + 1)


def _open_directory(directory: Path) -> Tokenizer:
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
            return BytePairs(_ranks_from_merges(*files), files)
    if (directory / "tokenizer.json").is_file():
        return BytePairs(_ranks_from_tokenizer_json(directory / "tokenizer.json"), [directory / "tokenizer.json"])
    if ranks:
        return BytePairs(_ranks_from_tiktoken(ranks[0]), ranks)
    raise UserError(f"tokenizer {directory}: holds no *.model, tokenizer.json, *.tiktoken, nor encoder.json with vocab.bpe")


def _ranks_from_tiktoken(path: Path) -> Vocabulary:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line:
            try:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except ValueError:
                raise UserError(f"tokenizer {path}: line {number}: expected `<base64> <rank>`") from None
    return _checked(Vocabulary(ranks, GPT2_PATTERN), path)


def _ranks_from_merges(vocabulary: Path, merges: Path) -> Vocabulary:
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {vocabulary}: cannot be read ({error})") from None
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _from_ids(ids, pairs, {}, GPT2_PATTERN, vocabulary)


def _ranks_from_tokenizer_json(path: Path) -> Vocabulary:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        model = value["model"]
        if model["type"] != "BPE" or value.get("normalizer") or model.get("byte_fallback"):
            raise UserError(f"tokenizer {path}: only byte-level BPE without a normalizer can be kept lossless")
        pattern = _pattern(value.get("pre_tokenizer"), path)
        added = {token["content"]: token["id"] for token in value.get("added_tokens", [])}
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        return _from_ids(model["vocab"], pairs, added, pattern, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error!r})") from None


def _pattern(pre_tokenizer: Any, path: Path) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise UserError(f"tokenizer {path}: add_prefix_space=true changes the text and cannot be kept lossless")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        if "Regex" in split["pattern"] and split.get("behavior") == "Isolated" and not split.get("invert"):
            return split["pattern"]["Regex"]
    raise UserError(f"tokenizer {path}: pre-tokenizer {kinds} is not known; ByteLevel, or Split by regex and ByteLevel, are")


def _from_ids(ids: dict[str, int], pairs: list[Any], added: dict[str, int], pattern: str, path: Path) -> Vocabulary:
    characters = _byte_characters()
    try:
        merged = [ids[left + right] for left, right in pairs]
    except (KeyError, ValueError) as error:
        raise UserError(f"tokenizer {path}: a merge does not fit the vocabulary ({error})") from None
    if merged != sorted(merged):
        raise UserError(f"tokenizer {path}: ids do not follow the order of the merges, which GPT-2-style BPE needs")
    known = {*added, *EOT_NAMES}
    try:
        ranks = {bytes(characters[c] for c in piece): i for piece, i in ids.items() if piece not in known}
    except KeyError as error:
        raise UserError(f"tokenizer {path}: the character {error} stands for no byte: not a byte-level vocabulary") from None
    specials = {**{name: i for name, i in ids.items() if name in known}, **added}
    eot_id = next((specials[name] for name in EOT_NAMES if name in specials), None)
    vocabulary = Vocabulary(ranks, pattern, eot_id, size=max(specials.values(), default=-1) + 1)
    return _checked(vocabulary, path)


def _checked(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    missing = sum(bytes([value]) not in vocabulary.ranks for value in range(256))
    if missing:
        raise UserError(f"tokenizer {path}: {missing} of the 256 single bytes have no id, so some texts could not be encoded")
    return vocabulary


def _byte_characters() -> dict[str, int]:
    """GPT-2's map from the printable characters in its files to bytes (bytes_to_unicode in OpenAI's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {**{chr(value): value for value in printable}, **{chr(256 + i): value for i, value in enumerate(others)}}


def _fingerprint(kind: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(kind.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _copy(files: Sequence[Path], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = directory / file.name
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)


def _join(pieces: list[bytes], ids: Iterable[int]) -> str:
    return b"".join([pieces[i] for i in ids]).decode("utf-8", "replace")
