"""The index of near-duplicate search on disk: per block of documents its digests, band keys and ids; arrays over all documents.

Documents have positional numbers: block by block in the order of the inputs, so that "earlier" means an earlier file (by name)
or an earlier place in the same file. A block's folder appears whole (it is renamed into place): what is there is good.
"""

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megagpt.corpus.runner.blocks import Block, batches, read_block
from megagpt.corpus.runner.cpu_limit import CpuLimitExceededError, cpu_limit
from megagpt.corpus.text.shingles import MinHashSettings, exact_digests, minhash, raw_digests
from megagpt.documents import Document
from megagpt.files import atomic_path, read_json, sync, write_json

DOCUMENTS_PER_CHUNK = 65_536
MAX_BATCH_CPU_SECONDS = 60.0
"""CPU time of the index of 1 Mi characters, or of one longer document."""
log = logging.getLogger(__name__)

_COLUMNS = ("exact.bin", "raw.u64", "shingles.u32", "keys.u64", "ids.bin", "id_ends.u64")


@dataclass(frozen=True, slots=True)
class IndexedBlock:
    """A block's place in the index: its folder and the number of its first document."""

    folder: Path
    first: int
    num_documents: int


def index_block(block: Block, folder: Path, settings: MinHashSettings) -> int:
    """Write the index of a block to `folder`; returns the number of its documents.

    exact.bin: 16 bytes a document. raw.u64: digests of the texts as they are. shingles.u32: how many (0: too few words, no near
    duplicates). keys.u64: chunks of
    DOCUMENTS_PER_CHUNK documents, band by band in each. ids.bin with id_ends.u64.
    """
    count = id_end = 0
    with new_folder(folder) as temporary, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((temporary / name).open("wb")) for name in _COLUMNS}
        documents = read_block(block)
        while True:
            chunk = batches(itertools.islice(documents, DOCUMENTS_PER_CHUNK), lambda document: len(document.text))
            found = [part for batch in chunk for part in _within_limit(batch, settings)]
            if not found:
                break
            ids = [name for batch in found for name in batch.ids]
            ends = id_end + np.cumsum([len(name) for name in ids]).astype(np.uint64)
            id_end = int(ends[-1])
            files["exact.bin"].write(b"".join(batch.digests for batch in found))
            files["raw.u64"].write(np.concatenate([batch.raw for batch in found]).tobytes())
            files["shingles.u32"].write(np.concatenate([batch.sizes for batch in found]).tobytes())
            files["keys.u64"].write(np.concatenate([batch.keys for batch in found]).T.tobytes())
            files["ids.bin"].write(b"".join(ids))
            files["id_ends.u64"].write(ends.tobytes())
            count += len(ids)
        write_json(temporary / "block.json", {"documents": count})
    return count


class _IndexedBatch(NamedTuple):
    digests: bytes
    raw: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    ids: list[bytes]


def _within_limit(documents: Sequence[Document], settings: MinHashSettings) -> list[_IndexedBatch]:
    """The index of documents. One that takes too much CPU time is taken for a copy of none."""
    try:
        with cpu_limit(MAX_BATCH_CPU_SECONDS, f"{len(documents)} from {documents[0].id}"):
            return [_index_batch(documents, settings)]
    except CpuLimitExceededError:
        if len(documents) > 1:
            return [part for document in documents for part in _within_limit([document], settings)]
        log.warning("dedup: %s takes more than %g s of CPU time: it is not compared", documents[0].id, MAX_BATCH_CPU_SECONDS)
        empty = _index_batch([replace(documents[0], text="")], settings)
        digest = hashlib.sha256(f"not compared: {documents[0].id}".encode("utf-8", "replace")).digest()
        return [empty._replace(digests=digest[: len(empty.digests)])]


def _index_batch(documents: Sequence[Document], settings: MinHashSettings) -> _IndexedBatch:
    texts = [document.text for document in documents]
    found = minhash(texts, settings)
    sizes = np.array([shingles.size for shingles in found.shingles], np.uint32)
    ids = [document.id.encode("utf-8", "replace") for document in documents]
    return _IndexedBatch(b"".join(exact_digests(texts)), np.array(raw_digests(texts), np.uint64), sizes, found.keys, ids)


def open_blocks(folders: Sequence[Path]) -> list[IndexedBlock]:
    """The blocks in order, with the numbers of their documents."""
    counts = [read_json(folder / "block.json")["documents"] for folder in folders]
    firsts = itertools.accumulate(counts, initial=0)
    return [IndexedBlock(folder, first, count) for folder, first, count in zip(folders, firsts, counts, strict=False)]


def read_exact(blocks: Sequence[IndexedBlock]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(first halves, second halves, documents) of the digests, chunk by chunk."""
    for block in blocks:
        with (block.folder / "exact.bin").open("rb") as file:
            for start, count in _chunk_bounds(block):
                halves = np.fromfile(file, np.uint64, 2 * count).reshape(count, 2)
                yield halves[:, 0], halves[:, 1], np.arange(start, start + count)


def read_raw(block: IndexedBlock) -> np.ndarray:
    """uint64 [documents of the block]: digests of the texts as they are; 0 where an index of release 0.1 does not have them."""
    path = block.folder / "raw.u64"
    return np.fromfile(path, np.uint64) if path.is_file() else np.zeros(block.num_documents, np.uint64)


def read_band(
    blocks: Sequence[IndexedBlock], band: int, num_bands: int, skip: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys, documents) of a band, without the documents that have no words and those for which `skip` [documents] is >= 0."""
    for block in blocks:
        sizes = np.memmap(block.folder / "shingles.u32", np.uint32, "r") if block.num_documents else np.empty(0, np.uint32)
        with (block.folder / "keys.u64").open("rb") as file:
            for start, count in _chunk_bounds(block):
                file.seek(8 * ((start - block.first) * num_bands + band * count))
                keys = np.fromfile(file, np.uint64, count)
                wanted = (sizes[start - block.first : start - block.first + count] > 0) & (skip[start : start + count] < 0)
                yield keys[wanted], np.arange(start, start + count)[wanted]


def read_shingle_counts(block: IndexedBlock) -> np.ndarray:
    """uint32 [documents of the block]."""
    return np.fromfile(block.folder / "shingles.u32", np.uint32)


class DocumentIds:
    """Ids by document number, read from disk as they are asked for."""

    def __init__(self, blocks: Sequence[IndexedBlock]) -> None:
        self._blocks = [block for block in blocks if block.num_documents]
        self._firsts = np.array([block.first for block in self._blocks])
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, number: int) -> str:
        which = int(np.searchsorted(self._firsts, number, "right")) - 1
        if which not in self._open:
            folder = self._blocks[which].folder
            columns = np.memmap(folder / "id_ends.u64", np.uint64, "r"), np.memmap(folder / "ids.bin", np.uint8, "r")
            if len(self._open) >= 64:
                self._open.pop(next(iter(self._open)))
            self._open[which] = columns
        ends, data = self._open[which]
        at = number - int(self._firsts[which])
        return data[int(ends[at - 1]) if at else 0 : int(ends[at])].tobytes().decode("utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` on success, its files synced, and removed on any error."""
    # Parts on two nodes make the same folder at the same time, and their processes may have the same number.
    temporary = folder.with_name(f"tmp-{secrets.token_hex(8)}-{folder.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        try:
            temporary.rename(folder)
            sync(folder.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary)  # another part was here first, with the same content
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.filename = str(folder)
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_array(path: Path, dtype: type, length: int, fill: int) -> Iterator[np.ndarray]:
    """Yield a memory-mapped array of `length` that becomes the file `path` on success."""
    with atomic_path(path) as temporary:
        if length == 0:
            yield np.empty(0, dtype)
            return
        with temporary.open("r+b") as file:
            # Now, for on a full disk the first touch of a page that is not there would kill the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
        array = np.memmap(temporary, dtype, "r+", shape=(length,))
        for start in range(0, length, 1 << 20):
            array[start : start + (1 << 20)] = fill
        yield np.asarray(array)
        array.flush()


def write_array(path: Path, array: np.ndarray) -> None:
    """The bytes of an array as a file. (ndarray.tofile, on a full disk, raises an error that does not say so.)"""
    with path.open("wb") as file:
        file.write(np.ascontiguousarray(array).data)


def open_array(path: Path, dtype: type) -> np.ndarray:
    """A memory-mapped array that `new_array` made."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _chunk_bounds(block: IndexedBlock) -> Iterator[tuple[int, int]]:
    """(number of the first document, how many) of each chunk."""
    for at in range(0, block.num_documents, DOCUMENTS_PER_CHUNK):
        yield block.first + at, min(DOCUMENTS_PER_CHUNK, block.num_documents - at)
