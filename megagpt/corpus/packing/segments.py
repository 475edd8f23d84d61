"""From documents to sorted segments of tokens, block by block: the workers' half of packing (see tokenize_documents.py).

A block is read, split into train and validation, tokenized, and written as segments: at most 16 Mi tokens, sorted by key, as
flat tokens (`.tokens`) and an Arrow table of rows (`.arrow`). The block's small .json comes last and means "committed".
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.overlap import Overlap, OverlapIndex, build_index, write_validation
from megagpt.corpus.packing.rows import Report, read_rows, refuse_too_many
from megagpt.corpus.packing.supervised import RowEncoder, tokenizer_for
from megagpt.corpus.runner.blocks import Block, batches, num_bytes, read_block
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.ownership import Ownership
from megagpt.corpus.runner.run_phase import SMALL_PHASE_BYTES, Task, run_phase
from megagpt.corpus.text.shingles import load_kernels
from megagpt.data.arrow import number_column, text_column
from megagpt.documents import Document
from megagpt.files import atomic_path, read_json, write_json
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import Encoder
from megagpt.tokenizer.open_tokenizer import open_tokenizer

SPLITS = ("train", "validation")


SEGMENT_TOKENS, SEGMENT_DOCUMENTS = 16 << 20, 1 << 19


SPLIT_SEED = 0x5EED
"""The split hashes ids with a seed of its own: it is independent of the order, and never moves when data or settings change."""


_Piece = tuple[str, Document, str]
"""(split, document, text)"""


Cuts = dict[str, dict[str, int]]
"""For the split by tail, per block and source, how many more characters go to train; empty for the split by hash."""


@dataclass(frozen=True, slots=True)
class Job:
    """The settings of every worker; small and picklable."""

    segments: str
    tokenizer: str
    ownership: Ownership
    config: TokenizeConfig
    dtype: str


def tokenize_blocks(blocks: Sequence[Block], job: Job, execution: Execution) -> list[dict[str, Any]] | None:
    """The records of all blocks, tokenized: segments (name, source, split, tokens), documents, empty, leaks (as in Overlap);
    of rows also malformed (file, line, kind, problem) and truncated.

    None while those of other parts are missing.
    """
    cuts: Cuts | None = {}
    if job.config.split_by == "tail":
        cuts = _tail_cuts(blocks, job, execution)
    if cuts is None or not _index_validation(blocks, cuts, job, execution):
        return None
    if not _each_block("tokenize", blocks, job, execution, _tokenize_block, cuts, small_bytes=0):
        return None
    records = [read_json(_record(job, block, "tokenize")) for block in blocks]
    if job.config.supervised is not None:
        refuse_too_many([row for record in records for row in record["malformed"]], job.config.supervised)
    return records


def _record(job: Job, block: Block, phase: str) -> Path:
    return Path(job.segments) / block.name / f"{block.index:06d}.{phase}.json"


def _each_block(
    label: str,
    blocks: Sequence[Block],
    job: Job,
    execution: Execution,
    work: Callable[[Block, Job, Cuts], int],
    cuts: Cuts,
    small_bytes: int = SMALL_PHASE_BYTES,
) -> bool:
    """Run `work` on the blocks whose record is not there; True when the records of all parts are."""
    tasks: list[Task] = [(_record(job, block, label), work, (block, job, cuts)) for block in blocks]
    where = {path: f"{block.path} from byte {block.start}" for (path, _, _), block in zip(tasks, blocks, strict=True)}
    return run_phase(
        label,
        tasks,
        execution,
        task_bytes=[num_bytes(block) for block in blocks],
        counted="documents",
        small_bytes=small_bytes,
        describe=where.__getitem__,
    )


# ---- split
def _tail_cuts(blocks: Sequence[Block], job: Job, execution: Execution) -> Cuts | None:
    """For the split by tail: per block record and source, how many more characters go to train. None: other parts remain."""
    if not _each_block("count", blocks, job, execution, _count_block, {}):
        return None
    counts = [read_json(_record(job, block, "count")) for block in blocks]
    totals = Counter[str]()
    for count in counts:
        totals.update(count)
    left = {source: int(total * (1 - job.config.validation_fraction)) for source, total in totals.items()}
    cuts = {}
    for block, count in zip(blocks, counts, strict=True):
        cuts[f"{block.name}/{block.index}"] = {source: left[source] for source in count}
        for source, characters in count.items():
            left[source] -= characters
    return cuts


def _count_block(block: Block, job: Job, _: Cuts) -> int:
    characters, documents = Counter[str](), 0
    for document in read_block(block):
        characters[document.source] += len(document.text)
        documents += 1
    write_json(_record(job, block, "count"), dict(characters))
    return documents


def _split(documents: Iterator[Document], config: TokenizeConfig, left: dict[str, int]) -> Iterator[_Piece]:
    """The split by tail may cut a document in two."""
    bound = int(config.validation_fraction * 2**64)
    for document in documents:
        if config.split_by == "hash":
            is_validation = xxhash.xxh3_64_intdigest(document.id.encode(), seed=SPLIT_SEED) < bound
            yield SPLITS[is_validation], document, document.text
            continue
        cut = min(max(left[document.source], 0), len(document.text))
        left[document.source] -= len(document.text)
        for split, text in zip(SPLITS, (document.text[:cut], document.text[cut:]), strict=True):
            if text or not document.text:
                yield split, document, text
            if not document.text:
                break


def _index_validation(blocks: Sequence[Block], cuts: Cuts, job: Job, execution: Execution) -> bool:
    """Make the index of validation documents, to look up training documents in. False: other parts remain."""
    if job.config.overlap_threshold is None or job.config.validation_fraction == 0:
        return True
    load_kernels()
    if not _each_block("validation", blocks, job, execution, _gather_validation, cuts):
        return False
    if not _overlap_index(job).is_dir():
        build_index([_record(job, block, "validation").with_suffix("") for block in blocks], _overlap_index(job))
    OverlapIndex(_overlap_index(job), job.config.overlap_threshold).find(["once"])  # workers are forked with its loop loaded
    return True


def _overlap_index(job: Job) -> Path:
    return Path(job.segments) / ".validation"


def _gather_validation(block: Block, job: Job, cuts: Cuts) -> int:
    pieces = _split(_documents(block, job), job.config, _left(block, cuts))
    validation = ((document.id, text) for split, document, text in pieces if split == "validation")
    record = _record(job, block, "validation")
    count = write_validation(validation, record.with_suffix(""))
    write_json(record, {"documents": count})
    return count


def _documents(block: Block, job: Job, report: Report = lambda line, kind, problem: None) -> Iterator[Document]:
    """The documents or rows of a block; malformed rows are reported."""
    supervised = job.config.supervised
    return read_block(block) if supervised is None else read_rows(Path(block.path), supervised, report)


def _left(block: Block, cuts: Cuts) -> dict[str, int]:
    return dict(cuts.get(f"{block.name}/{block.index}", {}))


# ---- tokenize into segments
def cached_tokenizer(path: str, encoder: Encoder, pattern: str | None) -> Tokenizer:
    """`open_tokenizer`, once in a process and its forks while the files stay as they are."""
    files = sorted(Path(path).iterdir() if Path(path).is_dir() else [Path(path)])
    stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return _open_tokenizer(path, encoder, pattern, stamps)


@lru_cache(maxsize=1)
def _open_tokenizer(path: str, encoder: Encoder, pattern: str | None, _: tuple[tuple[str, int, int], ...]) -> Tokenizer:
    return open_tokenizer(path, encoder, pattern=pattern)


class _Segments:
    """The segments of one block: rows and tokens by (source folder, split), written out sorted whenever they are many."""

    def __init__(self, block: Block, job: Job, eot_id: int) -> None:
        self.job, self.stem = job, f"{block.name}/{block.index:06d}"
        self._end = np.array(eot_id, job.dtype).tobytes()
        self.written: list[dict[str, Any]] = []
        self._rows: dict[tuple[str, str], dict[str, list[Any]]] = {}
        self._tokens = self._documents = 0

    def add(
        self,
        split: str,
        document: Document,
        ids: np.ndarray,
        text_bytes: int,
        targets: np.ndarray | None = None,
        end: int | None = None,
    ) -> None:
        """`targets` of a row: a bool for each of its tokens and its end, `end` or the end of text, which is added here."""
        source = document.source if self.job.config.separate_sources else ""
        rows = self._rows.setdefault(
            (source, split), {name: [] for name in ("key", "id", "url", "source", "bytes", "ids", "end")}
        )
        rows["key"].append(xxhash.xxh3_64_intdigest(document.id.encode(), seed=self.job.config.seed))
        rows["id"].append(document.id)
        rows["url"].append(document.url)
        rows["source"].append(document.source)
        rows["bytes"].append(text_bytes)
        rows["ids"].append(ids.astype(self.job.dtype))
        rows["end"].append(self._end if end is None else np.array(end, self.job.dtype).tobytes())
        if targets is not None:
            rows.setdefault("targets", []).append(targets)
        self._tokens += len(ids) + 1
        self._documents += 1
        if self._tokens >= SEGMENT_TOKENS or self._documents >= SEGMENT_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered, each group sorted by key (stable, so equal keys keep the input's order)."""
        import pyarrow as pa

        for (source, split), rows in sorted(self._rows.items()):
            name = f"{self.stem}-{len(self.written):04d}"
            order = np.argsort(np.array(rows["key"], np.uint64), kind="stable")
            ids = [rows["ids"][i] for i in order]
            lengths = np.array([len(x) + 1 for x in ids], np.int64)
            columns = {name: text_column([rows[name][i] for i in order]) for name in ("id", "url", "source")}
            columns["key"] = number_column([rows["key"][i] for i in order], np.uint64)
            columns["bytes"] = number_column([rows["bytes"][i] for i in order])
            columns["tokens"], columns["start"] = number_column(lengths), number_column(np.cumsum(lengths) - lengths)
            table = pa.table(columns)
            with atomic_path(Path(self.job.segments) / f"{name}.tokens") as temporary, temporary.open("wb") as file:
                for i in order:
                    file.write(rows["ids"][i].data)
                    file.write(rows["end"][i])
            if "targets" in rows:
                with atomic_path(Path(self.job.segments) / f"{name}.targets") as temporary, temporary.open("wb") as file:
                    for i in order:
                        file.write(rows["targets"][i].data)
            with atomic_path(Path(self.job.segments) / f"{name}.arrow") as temporary:
                with pa.ipc.new_file(str(temporary), table.schema) as writer:
                    writer.write_batch(table.combine_chunks().to_batches()[0])
            self.written.append({"name": name, "source": source, "split": split, "tokens": int(lengths.sum())})
        self._rows, self._tokens, self._documents = {}, 0, 0


def _tokenize_rows(block: Block, job: Job, cuts: Cuts) -> int:
    config, supervised = job.config, job.config.supervised
    assert supervised is not None
    assert config.pack_seq_len is not None
    tokenizer = tokenizer_for(cached_tokenizer(job.tokenizer, config.encoder, config.pattern), supervised)
    encoder = RowEncoder(tokenizer, supervised, config.pack_seq_len)
    segments, malformed, overlaps, documents = _Segments(block, job, tokenizer.eot_id), [], list[Overlap](), 0

    def report(line: int, kind: str, problem: str) -> None:
        malformed.append({"file": block.path, "line": line, "kind": kind, "problem": problem})
        refuse_too_many(malformed, supervised)

    pieces = _split(_documents(block, job, report), config, {})
    threshold = config.overlap_threshold
    index = OverlapIndex(_overlap_index(job), threshold) if threshold is not None and _overlap_index(job).is_dir() else None
    for batch in batches(pieces, lambda piece: len(piece[2])):
        for split, document, text in batch if index is None else _without_overlaps(batch, index, overlaps):
            found = encoder.encode(document, partial(report, int(document.meta["line"])))
            if found is not None:
                segments.add(split, document, found[0], len(text.encode()), found[1], encoder.end_of(document))
                documents += 1
    segments.flush()
    more = {"malformed": malformed, "truncated": encoder.num_truncated}
    found = {"documents": documents, "empty": 0, "leaks": [asdict(overlap) for overlap in overlaps], **more}
    write_json(_record(job, block, "tokenize"), {"segments": segments.written, **found})
    return documents


def _tokenize_block(block: Block, job: Job, cuts: Cuts) -> int:
    if job.config.supervised is not None:
        return _tokenize_rows(block, job, cuts)
    tokenizer = cached_tokenizer(job.tokenizer, job.config.encoder, job.config.pattern)
    segments, empty, documents = _Segments(block, job, tokenizer.eot_id), 0, 0
    begin = None if tokenizer.bos_id is None else np.array([tokenizer.bos_id], np.uint32)
    overlaps: list[Overlap] = []
    pieces = _split(read_block(block), job.config, _left(block, cuts))
    threshold = job.config.overlap_threshold
    index = OverlapIndex(_overlap_index(job), threshold) if threshold is not None and _overlap_index(job).is_dir() else None
    for batch in batches(pieces, lambda piece: len(piece[2])):
        if index is not None:
            batch = _without_overlaps(batch, index, overlaps)
        batch_ids = tokenizer.encode_batch([text for _, _, text in batch])
        for (split, document, text), ids in zip(batch, batch_ids, strict=True):
            if not text:
                empty += 1
                continue
            if begin is not None:
                ids = np.concatenate([begin, ids])
            segments.add(split, document, ids, len(text) if text.isascii() else len(text.encode()))
            documents += 1
    segments.flush()
    found = {"documents": documents, "empty": empty, "leaks": [asdict(overlap) for overlap in overlaps]}
    write_json(_record(job, block, "tokenize"), {"segments": segments.written, **found})
    return documents


def _without_overlaps(batch: list[_Piece], index: OverlapIndex, overlaps: list[Overlap]) -> list[_Piece]:
    """Drop training documents that are too similar to a validation document, and add them to `overlaps`."""
    found = iter(index.find([text for split, _, text in batch if split == "train"]))
    kept = []
    for split, document, text in batch:
        overlap = next(found) if split == "train" else None
        if overlap is None:
            kept.append((split, document, text))
        else:
            overlaps.append(Overlap(document.id, document.url, *overlap))
    return kept
