"""Open a tokenizer by name, file or folder."""

import re
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import (
    BytePairs,
    Encoder,
    ranks_from_merges,
    ranks_from_tiktoken,
    ranks_from_tokenizer_json,
)
from megagpt.tokenizer.extended import with_special_tokens
from megagpt.tokenizer.hugging_face import HuggingFaceTokenizer
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.reading import FILE_NAME, Reading, pattern_of, read_reading, reading_of_ranks
from megagpt.tokenizer.sentencepiece import SentencePiece

_RANK_LINE = re.compile(rb"\A[A-Za-z0-9+/]++={0,2} [0-9]++$")


def open_tokenizer(
    path: str | Path, encoder: Encoder = "tiktoken", *, pattern: str | None = None, saved: bool = False
) -> Tokenizer:
    """Open a tokenizer: the word `bytes`, a SentencePiece `.model`, a rank file (`.tiktoken`, Llama 3's `tokenizer.model`), a
    `tokenizer.json`, or a directory with one of these or with `encoder.json` and `vocab.bpe`. A `special_tokens.json` beside
    the files adds its tokens. Raises UserError that says what is expected.

    encoder: the library that encodes batches of byte-level BPE; ids do not depend on it. pattern: a name or a regular
    expression that cuts text, for files without one. saved: this program wrote the folder beside shards or a run, so it is
    read in the way of the release that wrote it.
    """
    if str(path) == "bytes":
        return Bytes()
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return with_special_tokens(_open_files(path, encoder, pattern, saved=saved or _is_beside_results(path)), folder)


def _open_files(path: Path, encoder: Encoder, pattern: str | None, *, saved: bool) -> Tokenizer:
    if path.is_dir():
        return _open_directory(path, encoder, pattern, saved=saved)
    if not path.is_file():
        raise UserError(f"tokenizer {path}: no such file or directory (give a path, or the word bytes)")
    if path.name == "bytes.tokenizer":
        return Bytes()
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and _is_rank_file(path)):
        return BytePairs(ranks_from_tiktoken(path, reading_of_ranks(path, pattern, saved=saved)), [path], encoder)
    if path.suffix == ".model":
        return SentencePiece(path)
    for vocabulary, merges in _MERGE_FILES:
        if path.name == vocabulary:
            return _open_merges(path, path.parent / merges, encoder, pattern, saved=saved)
    if path.suffix == ".json":
        return _open_json(path, encoder, saved=saved)
    raise UserError(f"tokenizer {path}: must be `bytes`, *.model, *.tiktoken, tokenizer.json, or encoder.json with vocab.bpe")


_MERGE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def _open_directory(directory: Path, encoder: Encoder, pattern: str | None, *, saved: bool) -> Tokenizer:
    if (directory / "bytes.tokenizer").is_file():
        return Bytes()
    models = sorted(directory.glob("*.model"))
    ranks = sorted(directory.glob("*.tiktoken"))
    if len(models) > 1 or (not models and len(ranks) > 1):
        raise UserError(f"tokenizer {directory}: has several models ({models[:2] or ranks[:2]}): name the file")
    found = [
        *models,
        *(directory / vocabulary for vocabulary, merges in _MERGE_FILES[:1] if (directory / merges).is_file()),
        directory / "tokenizer.json",  # before vocab.json with merges.txt, which have no pattern
        *(directory / vocabulary for vocabulary, merges in _MERGE_FILES[1:] if (directory / merges).is_file()),
        *ranks,
    ]
    for path in found:
        if path.is_file():
            return _open_files(path, encoder, pattern, saved=saved)
    raise UserError(f"tokenizer {directory}: holds no *.model, tokenizer.json, *.tiktoken, nor encoder.json with vocab.bpe")


def _is_beside_results(path: Path) -> bool:
    """Whether a folder is the tokenizer of shards or of a run."""
    beside = (path.parent / name for name in ("train/manifest.json", "validation/manifest.json", "checkpoints"))
    return path.name.startswith("tokenizer") and path.is_dir() and any(other.exists() for other in beside)


def _is_rank_file(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(_RANK_LINE.match(file.readline(4096).rstrip()))


def _open_merges(vocabulary: Path, merges: Path, encoder: Encoder, pattern: str | None, *, saved: bool) -> BytePairs:
    """Open vocab.json and merges.txt. They have no pattern: GPT-2's is taken, unless the folder is of another kind of model."""
    reading = Reading()
    record = vocabulary.parent / FILE_NAME
    settings: Any = vocabulary.parent / "tokenizer_config.json"
    if record.is_file():
        reading = read_reading(record)
    elif pattern is not None and not saved:
        reading = Reading(pattern=pattern_of(pattern))
    elif settings.is_file() and not saved:
        name = str((read_json(settings) or {}).get("tokenizer_class", "GPT2Tokenizer"))
        if not name.startswith(("GPT2", "Roberta", "Bart", "CodeGen", "OPT", "PreTrained")):
            raise UserError(
                f"tokenizer {vocabulary}: belongs to a {name}, and vocab.json with merges.txt do not say how text is cut: open "
                "its tokenizer.json, or give tokenize.pattern"
            )
    return BytePairs(ranks_from_merges(vocabulary, merges, reading), [vocabulary, merges], encoder)


def _open_json(path: Path, encoder: Encoder, *, saved: bool) -> Tokenizer:
    record = path.parent / FILE_NAME
    by_library = record.is_file() and read_reading(record).library == "tokenizers"
    if not by_library:
        try:
            tokenizer = BytePairs(ranks_from_tokenizer_json(path, saved=saved), [path], encoder)
            if tokenizer.lossless or saved:
                return tokenizer
        except UserError:
            if saved:
                raise
    if encoder == "fastokens":
        raise UserError(f"tokenizer {path}: encoder=fastokens only encodes GPT-2's byte pairs: use encoder=tiktoken")
    return HuggingFaceTokenizer(path)
