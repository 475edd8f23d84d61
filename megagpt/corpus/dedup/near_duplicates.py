"""Near duplicates from the index: which document is dropped for which kept one, verified, in bounded memory.

1. Per band, documents with equal keys are paired (external_join.py); union-find joins all pairs to components.
   Nothing is dropped for being in one: a component only says which documents may have to be compared.
2. Components are dealt out to partitions that fit in memory; signatures and shingles of their documents, and of no others, are
   computed again from the text and written by partition.
3. In a partition, documents are taken in order. One is dropped when its similarity to an earlier document that is KEPT reaches
   the threshold, otherwise it is kept. So the chain A~B~C loses only B if A and C differ, and of k copies of one template k - 1
   are compared with the first alone.

The result is the one that taking all documents in order would give: it depends on neither partitions nor workers. Documents
before `first_new` are those of corpora that were deduplicated before: they come first, and all of them stay.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megagpt.config import UserError
from megagpt.corpus.dedup.config import Verification
from megagpt.corpus.dedup.external_join import equal_key_pairs
from megagpt.corpus.dedup.index import (
    IndexedBlock,
    new_array,
    new_folder,
    open_array,
    read_band,
    read_exact,
    read_raw,
    read_shingle_counts,
    write_array,
)
from megagpt.corpus.runner.blocks import Block, batches, read_block
from megagpt.corpus.text.shingles import MinHashSettings, distinct, minhash
from megagpt.files import atomic_path, read_json, write_json

PAIRS_PER_READ = 1 << 20
KINDS = ("", "exact", "white_space", "near")
"""What resolve writes to kinds.u8: kept; the same text; the same but for white space and Unicode form; a near duplicate."""
COUNTS = ("comparisons", "exact_comparisons", "limited")
DECISION = np.dtype([("document", np.int64), ("kept", np.int64), ("similarity", np.float32)])
_BYTES_BESIDE_SHINGLES = 64
_KERNEL_BYTES_PER_BAND = 32


def find_exact(blocks: Sequence[IndexedBlock], path: Path, memory_bytes: int, first_new: int = 0) -> int:
    """Write int64 [documents] to `path`: the first document with the same digest, or -1. Returns how many have one."""
    count = 0
    num_documents = sum(block.num_documents for block in blocks)
    with contextlib.ExitStack() as stack:
        second = stack.enter_context(new_array(path.with_suffix(".second"), np.uint64, num_documents, 0))
        for _, halves, documents in read_exact(blocks):
            second[documents] = halves
        same = stack.enter_context(new_array(path, np.int64, num_documents, -1))
        chunks = ((halves, documents) for halves, _, documents in read_exact(blocks))
        for pairs in equal_key_pairs(chunks, memory_bytes=memory_bytes, scratch=path.parent):
            pairs = pairs[(second[pairs[:, 0]] == second[pairs[:, 1]]) & (pairs[:, 1] >= first_new)]
            same[pairs[:, 1]] = pairs[:, 0]
            count += len(pairs)
    path.with_suffix(".second").unlink(missing_ok=True)
    return count


def pair_band(blocks: Sequence[IndexedBlock], band: int, num_bands: int, same: Path, path: Path, memory_bytes: int) -> int:
    """Write int64 pairs of documents with equal keys of a band to `path`; returns how many. Exact copies are left out."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        chunks = read_band(blocks, band, num_bands, open_array(same, np.int64))
        for pairs in equal_key_pairs(chunks, memory_bytes=memory_bytes, scratch=path.parent):
            file.write(pairs.tobytes())
            count += len(pairs)
    return count


def plan_partitions(
    blocks: Sequence[IndexedBlock],
    pair_files: Sequence[Path],
    folder: Path,
    settings: MinHashSettings,
    memory_bytes: int,
    first_new: int = 0,
) -> int:
    """Join all pairs to components and deal these out to partitions of at most `memory_bytes`; returns how many partitions.

    Writes `folder`: roots.i64, the smallest document of each one's component; partitions.i64, each root's partition or -1 for a
    component of one document, or of none from first_new on; plan.json.
    """
    from megagpt.corpus.dedup import cluster_kernels

    num_documents = sum(block.num_documents for block in blocks)
    fixed = _record(settings).itemsize + _BYTES_BESIDE_SHINGLES + _KERNEL_BYTES_PER_BAND * settings.num_bands
    with new_folder(folder) as temporary:
        with new_array(temporary / "roots.i64", np.int64, num_documents, 0) as roots:
            for start in range(0, num_documents, PAIRS_PER_READ):
                end = min(num_documents, start + PAIRS_PER_READ)
                roots[start:end] = np.arange(start, end)
            for pair_file in pair_files:
                with pair_file.open("rb") as file:
                    while (pairs := np.fromfile(file, np.int64, 2 * PAIRS_PER_READ)).size:
                        cluster_kernels.unite(roots, pairs.reshape(-1, 2))
            cluster_kernels.flatten(roots)
            with new_array(temporary / "partitions.i64", np.int64, num_documents, 0) as weights:
                for block in blocks:
                    cluster_kernels.add_weights(roots, block.first, read_shingle_counts(block), fixed, first_new, weights)
                num_partitions = int(cluster_kernels.assign_partitions(weights, memory_bytes))
        write_json(temporary / "plan.json", {"partitions": num_partitions})
    return num_partitions


def gather_block(block: Block, place: IndexedBlock, plan: Path, settings: MinHashSettings, exact: bool, folder: Path) -> int:
    """Write to `folder` the records and, with `exact`, the shingle sets of a block's candidates, partition by partition."""
    roots = open_array(plan / "roots.i64", np.int64)[place.first : place.first + place.num_documents]
    wanted = open_array(plan / "partitions.i64", np.int64)[roots]
    candidates = np.flatnonzero(wanted >= 0)
    order = candidates[np.argsort(wanted[candidates], kind="stable")]
    position = np.full(place.num_documents, -1, np.int64)
    position[order] = np.arange(order.size)
    records = np.zeros(order.size, _record(settings))
    sets: list[np.ndarray] = [np.empty(0, np.uint32)] * order.size
    numbered = enumerate(read_block(block)) if order.size else iter(())
    chosen = ((number, document.text) for number, document in numbered if position[number] >= 0)
    for batch in batches(chosen, lambda item: len(item[1])):
        numbers = np.array([number for number, _ in batch])
        found, places = minhash([text for _, text in batch], settings), position[numbers]
        for number, at, its_shingles in zip(numbers, places, found.shingles, strict=True):
            if its_shingles.size == 0:
                raise UserError(f"{block.path}: document {number} of block {block.index} has changed since it was indexed")
            if exact:
                sets[at] = distinct(its_shingles)
        records["document"][places] = place.first + numbers
        records["num_shingles"][places] = [sets[at].size for at in places]
        records["keys"][places], records["signature"][places] = found.keys, found.signatures
    starts = np.searchsorted(wanted[order], np.arange(read_json(plan / "plan.json")["partitions"] + 1))
    shingle_starts = np.concatenate([[0], np.cumsum(records["num_shingles"], dtype=np.int64)])[starts]
    with new_folder(folder) as temporary:
        write_array(temporary / "starts.i64", np.stack([starts, shingle_starts]).astype(np.int64))
        write_array(temporary / "records.bin", records)
        with (temporary / "shingles.u32").open("wb") as file:
            for shingles in sets:
                file.write(shingles.data)
    return order.size


def decide_partition(
    folders: Sequence[Path],
    partition: int,
    settings: MinHashSettings,
    verification: Verification,
    path: Path,
    first_new: int = 0,
) -> dict[str, int]:
    """Write the decisions (DECISION records of dropped documents) of a partition to `path`; returns counts."""
    from megagpt.corpus.dedup import cluster_kernels

    with _gathered(folders, partition, settings, path) as (records, shingles):
        buckets = np.empty((settings.num_bands, records.size), np.int64)
        for band in range(settings.num_bands):
            _, buckets[band] = np.unique(records["keys"][:, band], return_inverse=True)
        starts = np.concatenate([[0], np.cumsum(records["num_shingles"], dtype=np.int64)])
        kept_by, similarity, counts = cluster_kernels.keep_representatives(
            buckets,
            np.ascontiguousarray(records["signature"]),
            starts,
            shingles,
            verification.threshold,
            verification.min_estimate(settings.num_rows),
            verification.exact,
            verification.max_comparisons,
            int(np.searchsorted(records["document"], first_new)),
        )
        dropped = np.flatnonzero(kept_by >= 0)
        decisions = np.empty(dropped.size, DECISION)
        decisions["document"] = records["document"][dropped]
        decisions["kept"] = records["document"][kept_by[dropped]]
        decisions["similarity"] = similarity[dropped]
        found = {name: int(counts[i]) for i, name in enumerate(COUNTS)}
    write_json(path.with_suffix(".json"), found)
    with atomic_path(path) as temporary:
        write_array(temporary, decisions)
    return found


def resolve(
    blocks: Sequence[IndexedBlock],
    same: np.ndarray,
    decision_files: Sequence[Path],
    *,
    kept_by: Path,
    similarity: Path,
    kinds: Path,
) -> None:
    """Write per document the kept document that it is dropped for (int64, -1: it is kept), their similarity (float32) and the
    kind of copy (uint8, of KINDS). `kept_by` comes last.

    A copy of a document that is itself dropped is dropped for what that one is dropped for.
    """
    with contextlib.ExitStack() as stack:
        keepers = stack.enter_context(new_array(kept_by, np.int64, same.size, -1))
        values = stack.enter_context(new_array(similarity, np.float32, same.size, 0))
        found = stack.enter_context(new_array(kinds, np.uint8, same.size, 0))
        raw = stack.enter_context(new_array(kinds.with_suffix(".raw"), np.uint64, same.size, 0))
        for block in blocks:
            raw[block.first : block.first + block.num_documents] = read_raw(block)
        for path in decision_files:
            with path.open("rb") as file:
                while (decisions := np.fromfile(file, DECISION, PAIRS_PER_READ)).size:
                    keepers[decisions["document"]] = decisions["kept"]
                    values[decisions["document"]] = decisions["similarity"]
                    found[decisions["document"]] = KINDS.index("near")
        for start in range(0, same.size, PAIRS_PER_READ):
            copies = start + np.flatnonzero(same[start : start + PAIRS_PER_READ] >= 0)
            first = same[copies]
            values[copies] = np.where(keepers[first] >= 0, values[first], 1.0)
            # An index of release 0.1 has no digests of texts as they are, and calls both kinds exact.
            equal = (raw[copies] == raw[first]) | (raw[copies] == 0) | (raw[first] == 0)
            of_kept = np.where(equal, KINDS.index("exact"), KINDS.index("white_space"))
            found[copies] = np.where(keepers[first] >= 0, KINDS.index("near"), of_kept)
            keepers[copies] = np.where(keepers[first] >= 0, keepers[first], first)
    kinds.with_suffix(".raw").unlink(missing_ok=True)


def _record(settings: MinHashSettings) -> np.dtype:
    return np.dtype(
        [
            ("document", np.int64),
            ("num_shingles", np.int64),
            ("keys", np.uint64, (settings.num_bands,)),
            ("signature", np.uint16, (settings.num_rows,)),
        ]
    )


@contextlib.contextmanager
def _gathered(
    folders: Sequence[Path], partition: int, settings: MinHashSettings, path: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(records, shingles) of a partition, documents in order. They are joined in files and mapped: the largest component may
    exceed the memory that is allowed, and then the system can write its pages back."""
    joined = {name: path.with_name(f"{path.name}.{name}") for name in ("records.bin", "shingles.u32")}
    try:
        for row, (name, target) in enumerate(joined.items()):
            width = _record(settings).itemsize if row == 0 else 4
            with target.open("wb") as out:
                for folder in folders:
                    starts = np.fromfile(folder / "starts.i64", np.int64).reshape(2, -1)[row, partition : partition + 2]
                    with (folder / name).open("rb") as file:
                        file.seek(int(starts[0]) * width)
                        out.write(file.read(int(starts[1] - starts[0]) * width))
        records = np.memmap(joined["records.bin"], _record(settings), "r")
        shingles = joined["shingles.u32"]
        yield records, np.asarray(np.memmap(shingles, np.uint32, "r")) if shingles.stat().st_size else np.empty(0, np.uint32)
    finally:
        for target in joined.values():
            target.unlink(missing_ok=True)
