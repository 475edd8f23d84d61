"""Blocks, the unit of work of a stage, and the outcomes of one."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import zstandard

from megagpt.config import UserError
from megagpt.documents import Document, Rejected, decompressed, parse_document, read_documents
from megagpt.files import read_json

T = TypeVar("T")

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """The records of the input file `path` that start in bytes [start, end); end None is the end of the file.

    `name` is the output's file name; `index` counts the blocks of one file from 0.
    """

    path: str
    name: str
    index: int = 0
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class MalformedRecord:
    """A damaged record that was skipped or only partly used: what was wrong, and where ("<file>: offset <n>")."""

    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class Seen:
    """The number of records read of a type ("response", "page"), so that a summary can be checked against the input."""

    type: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class DroppedText:
    """Text that extraction could not show in the middle of a sentence, by the name of the template that held it."""

    template: str
    count: int = 1


Outcome: TypeAlias = Document | Rejected | MalformedRecord | Seen | DroppedText
Process: TypeAlias = Callable[[Block], Iterable[Outcome]]


def output_name(path: str) -> str:
    """The output's name for an input: its own, with .jsonl.zst for the compression's ending (x.warc.gz -> x.warc.jsonl.zst)."""
    stem = path.rstrip("/").rpartition("/")[2]
    for ending in (".gz", ".bz2", ".zst"):
        stem = stem.removesuffix(ending)
    return stem.removesuffix(".jsonl") + ".jsonl.zst"


def document_blocks(paths: Sequence[Path], *, min_bytes: int = 8 << 20) -> list[Block]:
    """Blocks over document files: a stage's own output is split at its zstd frames, any other file is one block."""
    blocks = []
    for path in paths:
        done = path.with_name(path.name + ".done.json")
        frames = read_json(done)["frames"] if done.is_file() else [0]
        starts = [0]
        for start in frames:
            if start - starts[-1] >= min_bytes:
                starts.append(start)
        bounds = zip(starts, [*starts[1:], None], strict=True)
        blocks += [Block(str(path), output_name(str(path)), i, start, end) for i, (start, end) in enumerate(bounds)]
    return blocks


def read_block(block: Block) -> Iterator[Document]:
    """The documents of a block that `document_blocks` made. Raises UserError naming file, line and rule."""
    path = Path(block.path)
    if block.start == 0 and block.end is None:
        yield from read_documents(path)
        return
    with path.open("rb") as raw:
        raw.seek(block.start)
        data = raw.read() if block.end is None else raw.read(block.end - block.start)
    rest = b""
    number = 0
    try:
        for piece in decompressed(io.BytesIO(data), ".zst"):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                number += 1
                yield parse_document(line, where=f"{path}: line {number} after byte {block.start}")
    except (EOFError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cut off or damaged after line {number} from byte {block.start}: {error}") from None


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists of about BATCH_CHARACTERS, for functions that are faster on many at once."""
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def plan_hash(config_hash: str, blocks: list[Block]) -> str:
    """Identity of a file's work: the settings, the input's content (size, first and last 64 KiB) and how it is split."""
    path = Path(blocks[0].path)
    content = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content.update(f"{size}".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            content.update(file.read())
    bounds = [(block.start, block.end) for block in blocks]
    return hashlib.sha256(json.dumps([config_hash, content.hexdigest(), bounds]).encode()).hexdigest()


def num_bytes(block: Block) -> int:
    """Bytes of input in a block, for progress."""
    if block.end is not None:
        return block.end - block.start
    path = Path(block.path)
    return max(0, path.stat().st_size - block.start) if path.is_file() else 0
