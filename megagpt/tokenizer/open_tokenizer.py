"""Opens a tokenizer by name, file or folder."""

from pathlib import Path

from megagpt.config import UserError
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import (
    BytePairs,
    Encoder,
    ranks_from_merges,
    ranks_from_tiktoken,
    ranks_from_tokenizer_json,
)
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.sentencepiece import SentencePiece


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
