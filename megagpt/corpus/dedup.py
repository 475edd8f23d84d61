"""Deduplication: exact copies and verified near duplicates are dropped, of each group the earliest document is kept.

How it works. All phases commit whole files below output_dir/index, so a rerun goes on where the last one ended:
  blocks/       per block of input: digest, MinHash band keys, id of each document      (parallel over blocks)
  same.i64      exact copies, by external sort of the digests
  pairs/        per band, documents with equal keys, by external sort                   (parallel over bands)
  plan/         components of all pairs, by union-find in a memory-mapped array, dealt out to partitions
  candidates/   per block, signatures and shingles of documents in components > 1       (parallel over blocks)
  decisions/    per partition, who is dropped for whom, verified                        (parallel over partitions)
  kept_by.i64   the answer for every document
Then the stage writes the kept documents, and duplicates/<name> says for each dropped one which document was kept, and how
similar they are. With part=i/n, a part that finds a phase unfinished by others ends and says so: run all parts again.
"""

import functools
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
import zstandard
from pydantic import Field

from megagpt.config import Config, UserError, fingerprint
from megagpt.corpus import near_duplicates
from megagpt.corpus.blocks import Block, document_blocks, num_bytes, plan_hash, read_block
from megagpt.corpus.dedup_index import DocumentIds, IndexedBlock, index_block, open_array, open_blocks
from megagpt.corpus.executors import Execution
from megagpt.corpus.minhash import MinHashSettings
from megagpt.corpus.near_duplicates import Verification
from megagpt.corpus.phases import Task, run_phase
from megagpt.corpus.stage import StageSummary, run_stage
from megagpt.documents import Document, Rejected
from megagpt.files import atomic_path, read_json, write_json

log = logging.getLogger(__name__)


class DedupConfig(Config):
    """Settings of `tools/dedup_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files or globs; default: the output of the filters. The earliest document in their sorted order is kept."""
    near: bool = True
    """Drop near duplicates, too. Exact copies always go: texts that differ in nothing but white space and Unicode form."""
    words_per_shingle: int = Field(default=5, ge=1)
    """Documents are compared as sets of so many consecutive words, without case, accents, punctuation, digits of numbers."""
    num_bands: int = Field(default=14, ge=1)
    """FineWeb: 14 bands of 8 rows find .565 of the pairs of similarity .7, .924 at .8, .9996 at .9. RefinedWeb: 450 of 20."""
    rows_per_band: int = Field(default=8, ge=1)
    """Numbers of the signature that must all be equal for two documents to be compared."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """A document is dropped if its Jaccard similarity to a kept one is at least this."""
    verify: Literal["exact", "signature"] = "exact"
    """exact: Jaccard similarity of the shingle sets themselves. signature: its estimate from all rows."""
    max_comparisons: int = Field(default=1000, ge=1)
    """A document is compared with at most so many kept ones per band, the earliest; what is not compared is not dropped."""
    seed: int = Field(default=1, ge=0)
    """Seed of the MinHash functions."""
    memory_bytes: int = Field(default=2 << 30, ge=1 << 20)
    """Memory for sorting and comparing, of all workers together, whatever the size of the corpus. Changes no result."""

    @property
    def minhash(self) -> MinHashSettings:
        """Parameters of the signatures."""
        return MinHashSettings(self.words_per_shingle, self.num_bands, self.rows_per_band, self.seed)

    @property
    def verification(self) -> Verification:
        """When a document counts as a copy."""
        return Verification(self.verify == "exact", self.threshold, self.max_comparisons)


def dedup_documents(config: DedupConfig, inputs: Sequence[Path], output_dir: Path, execution: Execution) -> StageSummary | None:
    """Deduplicate document files into `output_dir`, one output per input. None: other parts have to finish a phase first.

    Raises UserError if output_dir holds the work of other settings or inputs, or an input is damaged.
    """
    blocks = document_blocks(inputs)
    settings = fingerprint(config.model_copy(update={"inputs": (), "memory_bytes": 2 << 30}))
    plans = [plan_hash(settings, [block]) for block in blocks]
    config_hash = fingerprint(_Plan(settings=settings, blocks=tuple(zip((block.name for block in blocks), plans, strict=True))))
    index = output_dir / "index"
    _claim(index, config_hash, overwrite=execution.overwrite)
    indexed = _find_duplicates(config, blocks, index, execution)
    if indexed is None:
        return None
    process = functools.partial(
        dedup_block, places={(b.path, b.index): i for b, i in zip(blocks, indexed, strict=True)}, index=index
    )
    summary = run_stage("dedup", blocks, output_dir, process, config_hash=config_hash, execution=execution)
    if summary.complete:
        _report(blocks, indexed, output_dir, execution)
    return summary


def dedup_block(block: Block, *, places: dict[tuple[str, int], IndexedBlock], index: Path) -> Iterator[Document | Rejected]:
    """The process of the stage: what `kept_by` says about each document."""
    place = places[block.path, block.index]
    kept_by = open_array(index / "kept_by.i64", np.int64)
    same = open_array(index / "same.i64", np.int64)
    for number, document in enumerate(read_block(block), start=place.first):
        if kept_by[number] < 0:
            yield document
        else:
            yield Rejected(document, "dedup:exact" if same[number] >= 0 else "dedup:near")


def describe(summary: StageSummary | None, output_dir: Path) -> str:
    """What was dropped, for the console."""
    if summary is None or not summary.complete:
        return f"{output_dir}: other parts remain; run all parts again when they are done"
    exact, near = (summary.rejected.get(f"dedup:{kind}", 0) for kind in ("exact", "near"))
    return (
        f"{output_dir}: kept {summary.kept:,} of {summary.documents_in:,} documents; "
        f"dropped {exact:,} exact copies and {near:,} near duplicates, listed in {output_dir / 'duplicates'}"
    )


class _Plan(Config):
    settings: str
    blocks: tuple[tuple[str, str], ...]


def _claim(index: Path, config_hash: str, *, overwrite: bool) -> None:
    marker = index / "index.json"
    if marker.is_file() and read_json(marker)["config_hash"] != config_hash:
        if not overwrite:
            raise UserError(
                f"{index.parent}: holds the work of other settings or other inputs: "
                "choose another output directory, or overwrite=true to replace it"
            )
        shutil.rmtree(index)
        shutil.rmtree(index.parent / "duplicates", ignore_errors=True)
    write_json(marker, {"config_hash": config_hash})


def _find_duplicates(
    config: DedupConfig, blocks: Sequence[Block], index: Path, execution: Execution
) -> list[IndexedBlock] | None:
    """Run the phases that are not done. Returns the blocks of the index, or None if a phase waits for other parts."""
    folders = [index / "blocks" / f"{i:06d}" for i in range(len(blocks))]
    if (index / "kept_by.i64").is_file():
        return open_blocks(folders)
    tasks = [(folder, index_block, (block, folder, config.minhash)) for block, folder in zip(blocks, folders, strict=True)]
    if not run_phase("dedup: index", tasks, execution, task_bytes=[num_bytes(block) for block in blocks], counted="documents"):
        return None
    indexed = open_blocks(folders)
    same_path = index / "same.i64"
    if not same_path.is_file():
        copies = near_duplicates.find_exact(indexed, same_path, config.memory_bytes)
        log.info("dedup: %d exact copies among %d documents", copies, sum(block.num_documents for block in indexed))
    decisions = _find_near(config, blocks, indexed, index, execution) if config.near else []
    if decisions is None:
        return None
    near_duplicates.resolve(
        open_array(same_path, np.int64), decisions, kept_by=index / "kept_by.i64", similarity=index / "similarity.f32"
    )
    return indexed


def _find_near(
    config: DedupConfig, blocks: Sequence[Block], indexed: Sequence[IndexedBlock], index: Path, execution: Execution
) -> list[Path] | None:
    """The files of decisions on near duplicates, or None if a phase waits for other parts."""
    share = max(1 << 20, config.memory_bytes // execution.num_workers)
    pairs = [index / "pairs" / f"{band:03d}" for band in range(config.num_bands)]
    tasks: list[Task] = [
        (path, near_duplicates.pair_band, (indexed, band, config.num_bands, index / "same.i64", path, share))
        for band, path in enumerate(pairs)
    ]
    num_documents = sum(place.num_documents for place in indexed)
    if not run_phase("dedup: bands", tasks, execution, task_bytes=[8 * num_documents] * len(tasks)):
        return None
    plan = index / "plan"
    if not plan.is_dir():
        near_duplicates.plan_partitions(indexed, pairs, plan, config.minhash, share // 2)
    candidates = [index / "candidates" / f"{i:06d}" for i in range(len(blocks))]
    tasks = [
        (folder, near_duplicates.gather_block, (block, place, plan, config.minhash, config.verification.exact, folder))
        for block, place, folder in zip(blocks, indexed, candidates, strict=True)
    ]
    if not run_phase("dedup: candidates", tasks, execution, task_bytes=[num_bytes(block) for block in blocks]):
        return None
    decisions = [index / "decisions" / f"{i:06d}" for i in range(read_json(plan / "plan.json")["partitions"])]
    tasks = [
        (path, near_duplicates.decide_partition, (candidates, partition, config.minhash, config.verification, path))
        for partition, path in enumerate(decisions)
    ]
    gathered = sum(path.stat().st_size for folder in candidates for path in folder.iterdir())
    task_bytes = [gathered // len(tasks)] * len(tasks) if tasks else []
    return decisions if run_phase("dedup: verification", tasks, execution, task_bytes=task_bytes) else None


def _report(blocks: Sequence[Block], indexed: Sequence[IndexedBlock], output_dir: Path, execution: Execution) -> None:
    """Write duplicates/<name> and dedup.json, then remove what only the phases needed."""
    files: dict[str, list[IndexedBlock]] = {}
    for block, place in zip(blocks, indexed, strict=True):
        files.setdefault(block.name, []).append(place)
    folder, index = output_dir / "duplicates", output_dir / "index"
    tasks = [(folder / name, _report_file, (places, indexed, index, folder / name)) for name, places in files.items()]
    alone = execution.model_copy(update={"part": "0/1"})
    task_bytes = [sum(16 * place.num_documents for place in places) for places in files.values()]
    run_phase("dedup: report", tasks, alone, task_bytes=task_bytes)
    counts = Counter[str]()
    for path in sorted((index / "decisions").glob("*.json")):
        counts.update(read_json(path))
    write_json(output_dir / "dedup.json", {name: counts[name] for name in near_duplicates.COUNTS})
    if counts["limited"]:
        log.info("dedup: %d documents met more kept ones in a band than max_comparisons allows", counts["limited"])
    for name in ("pairs", "plan", "candidates"):
        shutil.rmtree(index / name, ignore_errors=True)


def _report_file(places: Sequence[IndexedBlock], indexed: Sequence[IndexedBlock], index: Path, path: Path) -> None:
    kept_by = open_array(index / "kept_by.i64", np.int64)
    same = open_array(index / "same.i64", np.int64)
    similarity = open_array(index / "similarity.f32", np.float32)
    ids = DocumentIds(indexed)
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(raw, closefd=False) as stream:
            for place in places:
                for number in place.first + np.flatnonzero(kept_by[place.first : place.first + place.num_documents] >= 0):
                    value = {
                        "dropped": ids[int(number)],
                        "kept": ids[int(kept_by[number])],
                        "kind": "exact" if same[number] >= 0 else "near",
                        "similarity": round(float(similarity[number]), 4),
                    }
                    stream.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
