"""GPT-2-style byte-level BPE: read its published file formats, encode and decode."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from megagpt.config import UserError
from megagpt.tokenizer.reading import GPT2_PATTERN, PATTERNS, Reading, write_reading
from megagpt.tokenizer.special_ids import read_special_ids

Encoder: TypeAlias = Literal["tiktoken", "fastokens"]
"""The library that encodes byte-level BPE in batches."""
_LONG_BLANKS = re.compile(r"[^\S\x1c-\x1f]{100000,}")
"""White space as in tiktoken's expressions; Python's has four more control characters."""
MOST_BLANKS = 900_000
"""Most consecutive white-space characters that tiktoken accepts with any pattern."""
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<|im_end|>")
"""Names of the end-of-text token in published vocabularies; the first one that is found counts."""


class Vocabulary:
    """A byte-level BPE: bytes -> rank (both the id and the merge order), the pre-split pattern, the end-of-text id, the merges
    as the file spells them (None if it has none), and what the files do not say (`reading`)."""

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        eot_id: int | None = None,
        size: int = 0,
        merges: list[Any] | None = None,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        self.ranks, self.pattern, self.merges, self.reading = ranks, pattern, merges, reading
        self.eot_id = max(ranks.values()) + 1 if eot_id is None else eot_id
        self.size = max(size, self.eot_id + 1, max(ranks.values()) + 1)


class BytePairs:
    """GPT-2-style byte-level BPE. tiktoken's `encode_ordinary` is the reference. fastokens can encode batches instead, several
    times as fast; the first batch raises UserError if the two give different ids for a probe of hard strings.
    """

    kind = "bpe"
    dummy_prefix = False

    def __init__(self, vocabulary: Vocabulary, files: list[Path], encoder: Encoder = "tiktoken") -> None:
        import tiktoken

        special = read_special_ids(files[0].parent, vocabulary.eot_id, vocabulary.size, vocabulary.reading.bos_id)
        self.eot_id, self.eos_ids, self.bos_id = special.eot_id, special.eos_ids, special.bos_id
        self.vocab_size = vocabulary.size
        self.fingerprint = files_fingerprint(self.kind, [*files, *special.files], vocabulary.reading)
        self._ranks, self._pattern = vocabulary.ranks, vocabulary.pattern
        self.files = [*files, *special.files]
        self.vocabulary = vocabulary
        try:
            self._encoding = tiktoken.Encoding(
                "megagpt", pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={}
            )
        except ValueError as error:
            raise UserError(f"tokenizer {files[0]}: tokenize.pattern={vocabulary.pattern!r}: {error}") from None
        # tiktoken drops what a pattern does not match.
        known = vocabulary.pattern in PATTERNS.values()
        self.lossless = known or all(self.decode(self.encode(text)) == text for text in probe_texts())
        self._unchecked = _open_fastokens(vocabulary, files[0]) if encoder == "fastokens" else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text. tiktoken's expressions fail on about a million consecutive white-space characters, so long runs of
        them are cut here in the way of the pattern. Raises UserError if a run is too long and the pattern is not GPT-2's."""
        ids, position = [], 0
        for run in _LONG_BLANKS.finditer(text):
            if self._pattern != GPT2_PATTERN:
                if run.end() - run.start() < MOST_BLANKS:
                    continue
                raise UserError(f"tokenizer {self.files[0]}: {run.end() - run.start():,} consecutive white-space characters")
            end = run.end() - (run.end() < len(text))  # the last one belongs to the next word
            ids += self._encoding.encode_ordinary(text[position : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            position = end
        return ids + self._encoding.encode_ordinary(text[position:])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._unchecked is None:
            return [np.asarray(self.encode(text), np.uint32) for text in texts]
        return _encode_flat(self._fast, texts)

    def decode(self, ids: Iterable[int]) -> str:
        return join_pieces(self._pieces, ids)

    def token_bytes(self) -> list[bytes]:
        return self._pieces

    def save(self, directory: Path) -> None:
        copy_files(self.files, directory)
        write_reading(directory, self.vocabulary.reading)

    @cached_property
    def _fast(self) -> Any:
        """fastokens, after a comparison with tiktoken. It is first used in the first batch: its threads would break a fork."""
        probe = probe_texts()
        if any(a.tolist() != self.encode(b) for a, b in zip(_encode_flat(self._unchecked, probe), probe, strict=True)):
            raise UserError(f"tokenizer {self.files[0]}: fastokens and tiktoken give different ids: use encoder=tiktoken")
        return self._unchecked

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for piece, rank in self._ranks.items():
            pieces[rank] = piece
        return pieces


def ranks_from_tiktoken(path: Path, reading: Reading) -> Vocabulary:
    """Read a rank file: lines of base64 and rank. Raises UserError naming the line that is wrong."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line:
            try:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
            except ValueError:
                raise UserError(f"tokenizer {path}: line {number}: expected `<base64> <rank>`") from None
    return _checked(Vocabulary(ranks, reading.pattern, reading.eot_id, reading.vocab_size, reading=reading), path)


def ranks_from_merges(vocabulary: Path, merges: Path, reading: Reading = Reading()) -> Vocabulary:  # noqa: B008 (frozen)
    """Read GPT-2's encoder.json with vocab.bpe, or vocab.json with merges.txt. Raises UserError if they do not fit together."""
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {vocabulary}: cannot be read ({error})") from None
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _from_ids(ids, pairs, {}, reading, vocabulary)


def ranks_from_tokenizer_json(path: Path, *, saved: bool = False) -> Vocabulary:
    """Read a Hugging Face tokenizer.json. Raises UserError unless it is lossless byte-level BPE, for which tiktoken gives the
    same ids.

    saved: release 0.1 wrote the file, which treated every added token as special.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        model = value["model"]
        if model["type"] != "BPE" or value.get("normalizer") or model.get("byte_fallback"):
            raise UserError(f"tokenizer {path}: only byte-level BPE without a normalizer can be kept lossless")
        pattern = _pattern(value.get("pre_tokenizer"), path)
        added = {token["content"]: token["id"] for token in value.get("added_tokens", [])}
        if not saved and not all(token["special"] for token in value.get("added_tokens", [])):
            raise UserError(f"tokenizer {path}: it has added tokens that are neither special nor byte pairs")
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        vocabulary = _from_ids(model["vocab"], pairs, added, Reading(pattern=pattern), path)
        if not saved and len(vocabulary.ranks) > 256 + len(set(map("".join, pairs))):
            raise UserError(f"tokenizer {path}: pieces of the vocabulary come from no merge")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error!r})") from None
    vocabulary.reading = Reading()  # the file has the pattern
    return vocabulary


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
    raise UserError(
        f"tokenizer {path}: pre-tokenizer {kinds} is not supported: use ByteLevel, or Split by regex with ByteLevel"
    )


def _from_ids(ids: dict[str, int], pairs: list[Any], added: dict[str, int], reading: Reading, path: Path) -> Vocabulary:
    try:
        merged = [ids[left + right] for left, right in pairs]
    except (KeyError, ValueError) as error:
        raise UserError(f"tokenizer {path}: a merge does not fit the vocabulary ({error})") from None
    if merged != sorted(merged):
        raise UserError(f"tokenizer {path}: ids do not follow the order of the merges, which GPT-2-style BPE needs")
    known = {*added, *EOT_NAMES}
    to_bytes = dict.fromkeys(range(256), 0x10FFFF) | {ord(c): value for c, value in byte_characters().items()}
    try:
        ranks = {piece.translate(to_bytes).encode("latin-1"): i for piece, i in ids.items() if piece not in known}
    except UnicodeEncodeError as error:
        piece = next(piece for piece in ids if piece not in known and piece.translate(to_bytes) == error.object)
        raise UserError(
            f"tokenizer {path}: the character {piece[error.start]!r} does not stand for a byte: not a byte-level vocabulary"
        ) from None
    specials = {**{name: i for name, i in ids.items() if name in known}, **added}
    eot_id = next((specials[name] for name in EOT_NAMES if name in specials), None)
    size = max(specials.values(), default=-1) + 1
    return _checked(Vocabulary(ranks, reading.pattern, eot_id, size, pairs, reading), path)


def _checked(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    missing = sum(bytes([value]) not in vocabulary.ranks for value in range(256))
    if missing:
        raise UserError(f"tokenizer {path}: {missing} of the 256 single bytes have no id, so some texts could not be encoded")
    return vocabulary


def byte_characters() -> dict[str, int]:
    """GPT-2's map from the printable characters in its files to bytes (bytes_to_unicode in OpenAI's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {**{chr(value): value for value in printable}, **{chr(256 + i): value for i, value in enumerate(others)}}


def _open_fastokens(vocabulary: Vocabulary, path: Path) -> Any:
    """fastokens with a tokenizer.json without added tokens, so that no text can become a special token."""
    import fastokens

    if vocabulary.merges is None or vocabulary.pattern != GPT2_PATTERN:
        raise UserError(
            f"tokenizer {path}: encoder=fastokens needs a file with merges, and GPT-2's pattern: use encoder=tiktoken"
        )
    to_text = {value: character for character, value in byte_characters().items()}
    vocab = {piece.decode("latin-1").translate(to_text): rank for piece, rank in vocabulary.ranks.items()}
    # It needs ids without gaps. No text gives these names: they have a space, and no byte is spelt as one.
    vocab |= {f"special {i}": i for i in set(range(vocabulary.size)) - set(vocabulary.ranks.values())}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in vocabulary.merges]}
    value = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": split, "model": model}
    return fastokens.Tokenizer.from_json_str(json.dumps(value))


def _encode_flat(fast: Any, texts: Sequence[str]) -> list[np.ndarray]:
    ids, offsets = fast.encode_batch_flat(list(texts))
    ends = np.frombuffer(offsets, np.uint64)[1:-1].astype(np.int64)
    return np.split(np.frombuffer(ids, np.uint32), ends) if texts else []


def probe_texts() -> list[str]:
    """Strings on which pre-splitting rules differ: letters, digits, marks and spaces from all of Unicode."""
    points = [*range(0x20, 0x3100), *range(0x3100, 0x110000, 997)]
    alphabet = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    words = ["".join(alphabet[i : i + 7]) for i in range(0, len(alphabet), 7)]
    return ["", "<|endoftext|>", "we'll  they've\n\n 12345 \t x", *(f"{word} {word[0]}1{word[-1]}'s  {word}" for word in words)]


def files_fingerprint(kind: str, files: Sequence[Path], reading: Reading = Reading()) -> str:  # noqa: B008 (frozen)
    """sha256 (hex) of a kind, the contents of files, and the reading if it is not the default."""
    digest = hashlib.sha256(kind.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(reading.as_bytes)
    return digest.hexdigest()


def copy_files(files: Sequence[Path], directory: Path) -> None:
    """Copy files into a directory under the names that `open_tokenizer` expects: a .json without merges is tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {"encoder.json", "vocab.json", "special_ids.json"}
    for file in files:
        target = directory / ("tokenizer.json" if file.suffix == ".json" and file.name not in names else file.name)
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)


def join_pieces(pieces: list[bytes], ids: Iterable[int]) -> str:
    """The text of ids; pieces: the bytes of each id. Bytes that are not UTF-8 give U+FFFD."""
    return b"".join([pieces[i] for i in ids]).decode("utf-8", "replace")
