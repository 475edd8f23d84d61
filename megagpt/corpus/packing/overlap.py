"""Train/validation overlap: near duplicates across the split, found exhaustively.

1. Every block writes the shingle sets of its validation documents, and their shingles sorted.
2. These are merged to one index, range of shingles by range, in bounded memory: shingle -> validation documents.
3. The worker that tokenizes a block looks up every training document in the index, which is memory-mapped, and leaves out what
   has a Jaccard similarity of at least the threshold to a validation document. No pair is missed: sets of similarity t share t
   of either's shingles, so a lookup that finds fewer has seen enough, and all others are compared exactly.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.corpus.dedup.index import DocumentIds, IndexedBlock, new_folder, write_array
from megagpt.corpus.text.shingles import distinct, shingle_set, shingles_of_texts
from megagpt.files import read_json, write_json

WORDS_PER_SHINGLE = 5
MERGE_ENTRIES = 4 << 20
"""Shingles that are merged at once: about 100 MB."""


@dataclass(frozen=True)
class Overlap:
    """A dropped training document, and the validation document that it is too similar to."""

    id: str
    url: str | None
    validation: str
    similarity: float


def write_validation(documents: Iterable[tuple[str, str]], folder: Path) -> int:
    """Write the shingle sets of a block's validation documents (id, text) to `folder`; returns how many there are.

    sets.u32 with ends.i64: each set, ascending. keys.u32, owners.u32: all shingles, ascending, and the documents they are of.
    """
    ids, sets = [], []
    for document_id, text in documents:
        found = shingle_set(text, words_per_shingle=WORDS_PER_SHINGLE)
        if found.size:
            ids.append(document_id.encode("utf-8", "replace"))
            sets.append(found)
    joined = np.concatenate([np.empty(0, np.uint32), *sets])
    sizes = np.array([found.size for found in sets], np.int64)
    order = np.argsort(joined, kind="stable")
    with new_folder(folder) as temporary:
        write_array(temporary / "sets.u32", joined)
        write_array(temporary / "ends.i64", np.cumsum(sizes))
        write_array(temporary / "keys.u32", joined[order])
        write_array(temporary / "owners.u32", np.repeat(np.arange(len(sets), dtype=np.uint32), sizes)[order])
        (temporary / "ids.bin").write_bytes(b"".join(ids))
        write_array(temporary / "id_ends.u64", np.cumsum([len(item) for item in ids], dtype=np.uint64))
        write_json(temporary / "block.json", {"documents": len(ids)})
    return len(ids)


def build_index(blocks: Sequence[Path], folder: Path) -> None:
    """Join the folders that `write_validation` made, in this order, to one index in `folder`."""
    counts = [read_json(block / "block.json")["documents"] for block in blocks]
    blocks = [block for block, count in zip(blocks, counts, strict=True) if count]
    firsts = np.cumsum([0, *(count for count in counts if count)])
    columns = [(_mapped(block / "keys.u32", np.uint32), _mapped(block / "owners.u32", np.uint32)) for block in blocks]
    entries = sum(keys.size for keys, _ in columns)
    with new_folder(folder) as temporary:
        for name, kind in (("sets.u32", None), ("ends.i64", np.int64), ("ids.bin", None), ("id_ends.u64", np.uint64)):
            _join(blocks, name, kind, temporary / name)
        tops = np.zeros(65_537, np.int64)
        with (temporary / "keys.u32").open("wb") as key_file, (temporary / "owners.u32").open("wb") as owner_file:
            bounds = np.linspace(0, 65_536, max(1, min(65_536, -(-entries // MERGE_ENTRIES))) + 1).astype(np.int64)
            for low, high in itertools.pairwise(bounds.tolist()):
                parts = [(keys, owners, _at(keys, low), _at(keys, high)) for keys, owners in columns]
                keys = np.concatenate([np.empty(0, np.uint32), *(k[a:b] for k, _, a, b in parts)])
                owners = [o[a:b] + np.uint32(first) for (_, o, a, b), first in zip(parts, firsts[:-1], strict=True)]
                order = np.argsort(keys, kind="stable")
                key_file.write(keys[order].data)
                owner_file.write(np.concatenate([np.empty(0, np.uint32), *owners])[order].data)
                tops[1:] += np.bincount(keys >> np.uint32(16), minlength=65_536)
        write_array(temporary / "buckets.i64", np.cumsum(tops))
        write_json(temporary / "block.json", {"documents": int(firsts[-1])})


class OverlapIndex:
    """The validation documents, to look up training documents in; files are mapped, so workers share their memory."""

    def __init__(self, folder: Path, threshold: float) -> None:
        self.num_documents: int = read_json(folder / "block.json")["documents"]
        self._threshold = threshold
        self._keys, self._owners, self._sets = (
            _mapped(folder / f"{name}.u32", np.uint32) for name in ("keys", "owners", "sets")
        )
        self._buckets = np.fromfile(folder / "buckets.i64", np.int64)
        self._ends = np.concatenate([[0], np.fromfile(folder / "ends.i64", np.int64)])
        self._ids = DocumentIds([IndexedBlock(folder, 0, self.num_documents)])

    def find(self, texts: Sequence[str]) -> list[tuple[str, float] | None]:
        """For each text (id, similarity) of the validation document it is most similar to, if that reaches the threshold."""
        return [self._find(distinct(found)) for found in shingles_of_texts(texts, WORDS_PER_SHINGLE)[0]]

    def _find(self, found: np.ndarray) -> tuple[str, float] | None:
        from megagpt.corpus.packing import overlap_kernels

        if found.size == 0 or self.num_documents == 0:
            return None
        number, similarity = overlap_kernels.most_similar(
            found, self._keys, self._owners, self._buckets, self._sets, self._ends, self._threshold
        )
        return (self._ids[int(number)], round(float(similarity), 4)) if number >= 0 else None


def _at(keys: np.ndarray, top: int) -> int:
    """Where in ascending keys those of at least these upper 16 bits begin."""
    return keys.size if top == 65_536 else int(np.searchsorted(keys, np.uint32(top << 16)))


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _join(blocks: Sequence[Path], name: str, offsets: type | None, path: Path) -> None:
    """Concatenate a column of all blocks; numbers in it (`offsets`, their type) continue where the block before ended."""
    last = 0
    with path.open("wb") as out:
        for block in blocks:
            if offsets is None:
                out.write((block / name).read_bytes())
                continue
            values = np.fromfile(block / name, offsets) + offsets(last)
            last = int(values[-1])
            out.write(values.data)
