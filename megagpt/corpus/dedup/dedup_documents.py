"""Deduplication: exact copies and verified near duplicates are dropped, of each group the earliest document is kept.

How it works. All phases commit whole files below output_dir/index/<work>, so a rerun resumes where the last one stopped:
  known/        per block of the corpora in `against`: their index, copied (reference_corpora.py)
  blocks/       per block of input: digest, MinHash band keys, id of each document      (parallel over blocks)
  same.i64      exact copies, by external sort of the digests
  pairs/        per band, documents with equal keys, by external sort                   (parallel over bands)
  plan/         components of all pairs, by union-find in a memory-mapped array, dealt out to partitions
  candidates/   per block, signatures and shingles of documents in components > 1       (parallel over blocks)
  decisions/    per partition, who is dropped for whom, verified                        (parallel over partitions)
  kept_by.i64   the answer for every document
  parts/        with drop_repeated, the lines or paragraphs of the kept documents (repeated_lines.py)
Then the stage writes the kept documents, and duplicates/<name> says for each dropped one which document was kept, and how
similar they are. With part=i/n, a part that finds a phase unfinished by other parts reports it and ends: rerun all parts.
"""

import functools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import orjson
import zstandard

from megagpt.config import Config, UserError
from megagpt.corpus.dedup import near_duplicates
from megagpt.corpus.dedup.config import DedupConfig, PartKind
from megagpt.corpus.dedup.index import DocumentIds, IndexedBlock, index_block, open_array, open_blocks
from megagpt.corpus.dedup.reference_corpora import KnownBlock, KnownCorpus, copy_kept, open_known, write_own
from megagpt.corpus.dedup.repeated_lines import drop_parts, first_parts, index_parts, mark_repeated
from megagpt.corpus.runner.blocks import Block, Seen, document_blocks, num_bytes, plan_hash, read_block
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.ownership import (
    Ownership,
    commit,
    commit_by,
    folder_of,
    is_of_other_work,
    require_ownership,
    take_ownership,
    work_of,
)
from megagpt.corpus.runner.run_phase import Task, run_phase
from megagpt.corpus.runner.run_stage import clear, is_finished, run_stage
from megagpt.corpus.runner.summary import StageSummary, read_summary
from megagpt.corpus.text.shingles import load_kernels
from megagpt.documents import Document, Rejected
from megagpt.files import read_json, remove_leftovers, write_json
from megagpt.output_list import DONE, forget_list, list_or_none, problem_of
from megagpt.settings_record import MadeWith, fingerprint

FORMAT = 2
"""Of the stage and its index; it grows when the same settings give other results, or files of another form."""


MIN_RECALL = 0.9
"""Bands that propose fewer of the pairs at the threshold are warned of."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Work:
    """One deduplication: settings, folders and blocks. Documents of known corpora have the first numbers, then those of
    `blocks`."""

    config: DedupConfig
    ownership: Ownership
    index: Path
    known: tuple[KnownCorpus, ...]
    blocks: tuple[Block, ...]
    execution: Execution

    @property
    def known_blocks(self) -> list[KnownBlock]:
        return [block for corpus in self.known for block in corpus.blocks]

    @property
    def texts(self) -> list[Block]:
        """Where the text of every block of the index is read."""
        return [*(block.output for block in self.known_blocks), *self.blocks]

    def own(self, indexed: Sequence[IndexedBlock]) -> list[IndexedBlock]:
        """Those of the blocks of the index that are not known ones."""
        return list(indexed[len(indexed) - len(self.blocks) :])

    def part_folders(self) -> list[Path]:
        return [self.index / "parts" / f"{i:06d}" for i in range(len(self.blocks))]


def dedup_documents(config: DedupConfig, inputs: Sequence[Path], output_dir: Path, execution: Execution) -> StageSummary | None:
    """Deduplicate document files into `output_dir`, one output per input. None: other parts have to finish a phase first.

    Raises UserError if output_dir holds the work of other settings or inputs, if a corpus in `against` does not fit, or if an
    input is damaged.
    """
    _warn_of_recall(config)
    blocks = document_blocks(inputs)
    compared = (*asdict(config.minhash), *(("drop_repeated",) if config.drop_repeated else ()))
    known = tuple(open_known(work_dir, config, compared) for work_dir in config.against)
    made_with = _made_with(config, blocks, known)
    marker = output_dir / "index" / "index.json"
    _refuse_other_work(marker, made_with, overwrite=execution.overwrite)
    if made_with.keeps(marker, finished=is_finished(output_dir), overwrite=execution.overwrite):
        return read_summary(output_dir)
    ownership = take_ownership(marker, made_with.config_hash, **made_with.to_json())
    work = _Work(config, ownership, folder_of(marker.parent, ownership.work), known, tuple(blocks), execution)
    remove_leftovers((output_dir / "index", work.index, output_dir / "duplicates"))
    _drop_damaged(output_dir, verify=execution.verify)
    with work_of(ownership):
        indexed = _find_duplicates(work)
        if indexed is None or (config.drop_repeated and not _find_repeated(work, work.own(indexed))):
            return None
    require_ownership(ownership)
    own = work.own(indexed)
    firsts = first_parts(work.part_folders()) if config.drop_repeated else [0] * len(own)
    places = {(b.path, b.index): (i, first) for b, i, first in zip(blocks, own, firsts, strict=True)}
    process = functools.partial(dedup_block, places=places, index=work.index, kind=config.drop_repeated)

    def finish() -> dict[Path, bool]:
        write_own(work.index, {**asdict(config.minhash), "drop_repeated": config.drop_repeated}, blocks, own)
        _report(work, indexed, output_dir)
        arrays = (path for path in work.index.rglob("*") if path.is_file() and path.parent.name != "decisions")
        reports = [output_dir / "dedup.json", *(output_dir / "duplicates" / block.name for block in blocks)]
        return {**dict.fromkeys(arrays, False), **dict.fromkeys([*reports, work.index / "own.json"], True)}

    return run_stage("dedup", blocks, output_dir, process, made_with=made_with, execution=execution, finish=finish)


def _warn_of_recall(config: DedupConfig) -> None:
    """Warn if the bands do not propose most of the pairs that the threshold asks for."""
    if not config.near or config.recall_at_threshold >= MIN_RECALL:
        return
    chance = config.threshold**config.rows_per_band
    needed = math.ceil(math.log(1 - MIN_RECALL) / math.log1p(-chance)) if chance > 0 else 0
    fewer_rows = next((r for r in range(config.rows_per_band, 0, -1) if _recall(config, r) >= MIN_RECALL), 1)
    log.warning(
        "dedup.threshold=%g: dedup.num_bands=%d of dedup.rows_per_band=%d find %.0f %% of the pairs of that similarity, "
        "the others stay: dedup.num_bands=%d, or dedup.rows_per_band=%d, would find %.0f %%",
        config.threshold,
        config.num_bands,
        config.rows_per_band,
        100 * config.recall_at_threshold,
        needed,
        fewer_rows,
        100 * MIN_RECALL,
    )


def _recall(config: DedupConfig, rows_per_band: int) -> float:
    return config.model_copy(update={"rows_per_band": rows_per_band}).recall_at_threshold


def dedup_block(
    block: Block, *, places: dict[tuple[str, int], tuple[IndexedBlock, int]], index: Path, kind: PartKind | None
) -> Iterator[Document | Rejected | Seen]:
    """The process of the stage: keep or drop each document by `kept_by`, and drop the repeated parts of kept ones."""
    place, first_part = places[block.path, block.index]
    kept_by = open_array(index / "kept_by.i64", np.int64)
    kinds = open_array(index / "kinds.u8", np.uint8)
    flags = iter(open_array(index / "repeated.u8", np.uint8)[first_part:]) if kind else iter(())
    repeated = 0
    for number, document in enumerate(read_block(block), start=place.first):
        if kept_by[number] >= 0:
            yield Rejected(document, f"dedup:{near_duplicates.KINDS[kinds[number]]}")
            continue
        if kind:
            text, count, emptied = drop_parts(document.text, kind, flags)
            repeated += count
            if emptied:
                yield Rejected(document, f"dedup:{kind}")
                continue
            document = replace(document, text=text)
        yield document
    if kind:
        yield Seen(f"repeated {kind}", repeated)


def describe(summary: StageSummary | None, output_dir: Path) -> str:
    """Counts of dropped documents, for the console."""
    if summary is None or not summary.complete:
        return f"{output_dir}: other parts remain; run all parts again when they are done"
    exact, spacing, near = (summary.rejected.get(f"dedup:{kind}", 0) for kind in near_duplicates.KINDS[1:])
    lines = [
        f"{output_dir}: kept {summary.kept:,} of {summary.documents_in:,} documents; "
        f"dropped {exact:,} exact copies, {spacing:,} that differ in white space or Unicode form only, and {near:,} near "
        f"duplicates, listed in {output_dir / 'duplicates'}"
    ]
    for kind in get_args(PartKind):
        if f"repeated {kind}" in summary.records:
            emptied = summary.rejected.get(f"dedup:{kind}", 0)
            lines.append(
                f"  and {summary.records[f'repeated {kind}']:,} repeated {kind}, which left nothing of {emptied:,} documents"
            )
    return "\n".join(lines)


class _Plan(Config):
    settings: str
    blocks: tuple[tuple[str, str], ...]
    known: tuple[str, ...]


def _made_with(config: DedupConfig, blocks: Sequence[Block], known: Sequence[KnownCorpus]) -> MadeWith:
    settings = config.model_copy(update={"inputs": (), "against": (), "memory_bytes": 2 << 30})
    plans = ((block.name, plan_hash(fingerprint(settings), [block])) for block in blocks)
    plan = _Plan(settings=fingerprint(settings), blocks=tuple(plans), known=tuple(corpus.plan for corpus in known))
    return MadeWith(fingerprint(plan), "dedup", settings, format=FORMAT)


def _refuse_other_work(marker: Path, made_with: MadeWith, *, overwrite: bool) -> None:
    """Raise UserError over the work of other settings or inputs; with `overwrite` remove it."""
    index, output_dir = marker.parent, marker.parent.parent
    is_other = is_of_other_work(marker, made_with.config_hash)
    if is_other and not overwrite:
        what = made_with.other(read_json(marker))
        raise UserError(
            f"{output_dir}: holds the work of {what}: choose another output directory, or overwrite=true to replace it"
        )
    if not is_other and (not overwrite or made_with.fits(marker, finished=is_finished(output_dir))):
        return
    clear(output_dir)  # the old result must not look complete while the new one is made
    shutil.rmtree(index, ignore_errors=True)
    shutil.rmtree(output_dir / "duplicates", ignore_errors=True)


def _drop_damaged(output_dir: Path, *, verify: bool) -> None:
    """Remove what is listed of the index and the reports and is not as it was written: the phases make it again."""
    listed = list_or_none(output_dir) or {}
    problems = {
        output_dir / name: problem
        for name, entry in listed.items()
        if not name.endswith(DONE) and (problem := problem_of(output_dir / name, entry, verify=verify))
    }
    if problems:
        forget_list(output_dir)
    for path, problem in problems.items():
        log.warning("%s: it is made again", problem)
        path.unlink(missing_ok=True)
        if path.parent.parent.name in ("blocks", "known", "parts"):  # committed as one folder
            shutil.rmtree(path.parent, ignore_errors=True)
        if "index" in path.relative_to(output_dir).parts:
            for answer in output_dir.glob("index/*/*"):
                if answer.name in ("kept_by.i64", "emptied.u8"):  # what is there of these is taken for the end of all phases
                    answer.unlink()


def _find_duplicates(work: _Work) -> list[IndexedBlock] | None:
    """Run the phases that are not done. Returns the blocks of the index, or None if a phase waits for other parts."""
    config, index, known = work.config, work.index, work.known_blocks
    folders = [index / "known" / f"{i:06d}" for i in range(len(known))]
    tasks: list[Task] = [(path, copy_kept, (old, path, config.num_bands)) for old, path in zip(known, folders, strict=True)]
    own = [index / "blocks" / f"{i:06d}" for i in range(len(work.blocks))]
    if (index / "kept_by.i64").is_file() and all(folder.is_dir() for folder in (*folders, *own)):
        return open_blocks([*folders, *own])
    load_kernels()
    if not run_phase("dedup: known", tasks, work.execution, task_bytes=[num_bytes(block.output) for block in known]):
        return None
    tasks = [(folder, index_block, (block, folder, config.minhash)) for block, folder in zip(work.blocks, own, strict=True)]
    sizes = [num_bytes(block) for block in work.blocks]
    if not run_phase("dedup: index", tasks, work.execution, task_bytes=sizes, counted="documents"):
        return None
    indexed = open_blocks([*folders, *own])
    first_new = indexed[len(known)].first
    same_path = index / "same.i64"
    if not same_path.is_file():
        copies = near_duplicates.find_exact(indexed, same_path, config.memory_bytes, first_new)
        log.info("dedup: %d copies among %d documents", copies, sum(block.num_documents for block in work.own(indexed)))
    decisions = _find_near(work, indexed, first_new) if config.near else []
    if decisions is None:
        return None
    arrays = {name: index / f"{name}.{kind}" for name, kind in (("kept_by", "i64"), ("similarity", "f32"), ("kinds", "u8"))}
    near_duplicates.resolve(indexed, open_array(same_path, np.int64), decisions, **arrays)
    return indexed


def _find_near(work: _Work, indexed: Sequence[IndexedBlock], first_new: int) -> list[Path] | None:
    """The files of decisions on near duplicates, or None if a phase waits for other parts."""
    config, index, execution = work.config, work.index, work.execution
    share = max(1 << 20, config.memory_bytes // execution.num_processes)
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
        near_duplicates.plan_partitions(indexed, pairs, plan, config.minhash, share // 2, first_new)
    candidates = [index / "candidates" / f"{i:06d}" for i in range(len(indexed))]
    tasks = [
        (folder, near_duplicates.gather_block, (block, place, plan, config.minhash, config.verification.exact, folder))
        for block, place, folder in zip(work.texts, indexed, candidates, strict=True)
    ]
    if not run_phase("dedup: candidates", tasks, execution, task_bytes=[num_bytes(block) for block in work.texts]):
        return None
    decisions = [index / "decisions" / f"{i:06d}" for i in range(read_json(plan / "plan.json")["partitions"])]
    tasks = [
        (path, near_duplicates.decide_partition, (candidates, partition, config.minhash, config.verification, path, first_new))
        for partition, path in enumerate(decisions)
    ]
    gathered = sum(path.stat().st_size for folder in candidates for path in folder.iterdir())
    task_bytes = [gathered // len(tasks)] * len(tasks) if tasks else []
    return decisions if run_phase("dedup: verification", tasks, execution, task_bytes=task_bytes) else None


def _find_repeated(work: _Work, own: Sequence[IndexedBlock]) -> bool:
    """Find the lines or paragraphs that occurred before. False: a phase waits for other parts."""
    kept_by, kind, folders = work.index / "kept_by.i64", work.config.drop_repeated, work.part_folders()
    tasks: list[Task] = [
        (folder, index_parts, (block, place, kept_by, kind, work.config.fold_numbers, folder))
        for block, place, folder in zip(work.blocks, own, folders, strict=True)
    ]
    sizes = [num_bytes(block) for block in work.blocks]
    if not run_phase(f"dedup: {kind}", tasks, work.execution, task_bytes=sizes, counted=kind):
        return False
    if not (work.index / "emptied.u8").is_file():
        old = [path for corpus in work.known for path in corpus.parts]
        mark_repeated(old, folders, work.index, work.config.memory_bytes)
    return True


def _report(work: _Work, indexed: Sequence[IndexedBlock], output_dir: Path) -> None:
    """Write duplicates/<name> and dedup.json, then remove what only the phases needed."""
    files: dict[str, list[IndexedBlock]] = {}
    for block, place in zip(work.blocks, work.own(indexed), strict=True):
        files.setdefault(block.name, []).append(place)
    folder, index = output_dir / "duplicates", work.index
    tasks = [(folder / name, _report_file, (places, indexed, work, folder / name)) for name, places in files.items()]
    everything = work.execution.model_copy(update={"part": "0/1"})
    task_bytes = [sum(16 * place.num_documents for place in places) for places in files.values()]
    run_phase("dedup: report", tasks, everything, task_bytes=task_bytes)
    counts = Counter[str]()
    for path in sorted((index / "decisions").glob("*.json")):
        counts.update(read_json(path))
    totals = {name: counts[name] for name in near_duplicates.COUNTS}
    commit_by(work.ownership, write_json, output_dir / "dedup.json", totals)
    if counts["limited"]:
        log.info("dedup: %d documents share a band with more kept documents than max_comparisons allows", counts["limited"])
    others = [path for path in index.parent.iterdir() if path.is_dir() and path != index]
    for path in (*(index / name for name in ("pairs", "plan", "candidates")), *others):
        shutil.rmtree(path, ignore_errors=True)
    # What killed runs left; a small .json file may be that of another part which is at this point now.
    for leftover in [*index.rglob("tmp-*"), *index.rglob(".tmp-*"), *index.glob("runs-*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        elif ".json-" not in leftover.name:
            leftover.unlink(missing_ok=True)
    remove_leftovers({leftover.parent for leftover in index.rglob(".tmp-*")})


def _report_file(places: Sequence[IndexedBlock], indexed: Sequence[IndexedBlock], work: _Work, path: Path) -> None:
    kept_by = open_array(work.index / "kept_by.i64", np.int64)
    kinds = open_array(work.index / "kinds.u8", np.uint8)
    similarity = open_array(work.index / "similarity.f32", np.float32)
    ids = DocumentIds(indexed)
    with commit(path, work.ownership) as temporary, temporary.open("wb") as raw:
        with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(raw, closefd=False) as stream:
            for place in places:
                for number in place.first + np.flatnonzero(kept_by[place.first : place.first + place.num_documents] >= 0):
                    value = {
                        "dropped": ids[int(number)],
                        "kept": ids[int(kept_by[number])],
                        "kind": near_duplicates.KINDS[kinds[number]],
                        "similarity": round(float(similarity[number]), 4),
                    }
                    stream.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
