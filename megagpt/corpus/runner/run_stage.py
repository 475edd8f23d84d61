"""Run a pure function over many files: skip what is done, commit atomically, count, report progress.

How it works. The unit of work is a `Block`, the records of one input file that start in a byte range. Workers of a
concurrent.futures.Executor (a process pool, or Dask on several machines) each run `process(block)` and commit what it yields
below `output_dir/.parts/`; the block's small .json comes last and means "committed". When all blocks of a file are there, their
zstd frames are concatenated to `output_dir/<name>` and `<name>.done.json` is written, last of all. A rerun skips finished files
and blocks. No byte of a result depends on the number of workers, on `part=i/n` or on the executor.

    output_dir/<name>             kept documents           output_dir/<name>.done.json   counts, sizes, sha256
    output_dir/dropped/<name>     id, url, reason of every rejected document
    output_dir/rejected/<name>    a sample of rejected documents per reason, to be read (reason in meta.rejected)
    output_dir/outputs.json       all of these with size and sha256, once every file is finished (output_list.py)
    output_dir/summary.json       the sum over all finished files, and that of outputs.json; written last
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.corpus.runner.blocks import Block, MalformedRecord, Outcome, Process, Seen, num_bytes, plan_hash
from megagpt.corpus.runner.commit import add_counts, commit_block, committed, finish_file, is_done
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.executors import run_tasks
from megagpt.corpus.runner.ownership import Ownership, commit_by, take_ownership, work_of
from megagpt.corpus.runner.progress import Progress
from megagpt.corpus.runner.summary import StageSummary, read_summary, stage_outputs
from megagpt.files import read_json, remove_leftovers, write_json
from megagpt.output_list import describe_file, forget_list, list_or_none, problems_of_file, write_list
from megagpt.settings_record import MadeWith

__all__ = ["Block", "Execution", "MalformedRecord", "Outcome", "Process", "Seen", "StageSummary", "run_stage", "stage_outputs"]

MAX_TEMPLATE_NAMES = 1000

log = logging.getLogger(__name__)


def run_stage(
    name: str,
    blocks: Sequence[Block],
    output_dir: Path,
    process: Process,
    *,
    made_with: MadeWith,
    execution: Execution,
    finish: Callable[[], Mapping[Path, bool]] = dict,
) -> StageSummary:
    """Run `process`, a picklable pure function, over `blocks` and commit its outcomes under `output_dir`.

    Missing or damaged files of a finished output are made again, and only those: sizes are compared (execution.verify: sums).
    `finish` runs when every file exists; the files that it writes are listed too (path -> whether with its sum). A finished
    output of an earlier format is kept as it is. Raises UserError if output_dir was made with other settings, holds
    outputs of inputs no longer given or an unfinished output of an earlier format, or two inputs share an output name, or
    another start has taken output_dir for other work meanwhile; WorkerDiedError naming the blocks in flight if a worker was
    killed; OSError if the disk is full.
    """
    files = _group_by_file(blocks)
    config_hash = made_with.config_hash
    plans = {file: plan_hash(config_hash, file_blocks) for file, file_blocks in files.items()}
    _refuse_other_work(output_dir, name, made_with, plans, overwrite=execution.overwrite)
    finished = is_finished(output_dir) and all(is_done(output_dir, file, plan) for file, plan in plans.items())
    if made_with.keeps(output_dir / "stage.json", finished=finished, overwrite=execution.overwrite):
        return read_summary(output_dir)
    ownership = _take_ownership(output_dir, name, made_with, plans)
    remove_leftovers((output_dir, output_dir / "dropped", output_dir / "rejected"))
    index, count = execution.part_of
    unlisted = finished and read_summary(output_dir).outputs is None
    _drop_outdated(output_dir, plans, verify=execution.verify)
    pending = [file for file in files if not is_done(output_dir, file, plans[file])]
    if pending:
        forget_list(output_dir)
    mine = set(blocks[index::count])
    todo = [
        block
        for file in pending
        for block in files[file]
        if block in mine and committed(output_dir, block, plans[file]) is None
    ]
    total = sum(num_bytes(block) for block in todo)
    with work_of(ownership), Progress(name, total, skipped=len(mine) - len(todo)) as progress:

        def consume(block: Block, counts: dict[str, Any]) -> None:
            progress.add(num_bytes(block), kept=counts["kept"], rejected=sum(counts["rejected"].values()))
            finish_file(name, output_dir, config_hash, plans[block.name], files[block.name], ownership)

        tasks = [(block, commit_block, (block, output_dir, process, plans[block.name])) for block in todo]
        if tasks:
            run_tasks(tasks, execution, consume, lambda block: f"{block.path} from byte {block.start}")
    for file in pending:
        finish_file(name, output_dir, config_hash, plans[file], files[file], ownership)
    # What an earlier release finished gets no list now: nobody can say that it still is what was written.
    summary = _write_summary(name, output_dir, config_hash, files, ownership, finish, listed=bool(pending) or not unlisted)
    if summary.complete:
        _sweep(output_dir)
    return summary


# ---- what is done already


def _group_by_file(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    files: dict[str, list[Block]] = {}
    for block in blocks:
        files.setdefault(block.name, []).append(block)
    for name, group in files.items():
        inputs = sorted({block.path for block in group})
        if len(inputs) > 1:
            raise UserError(f"{inputs[0]} and {inputs[1]} would both be written to {name}: rename one, or use two runs")
        if [block.index for block in group] != list(range(len(group))):
            raise ValueError(f"{name}: blocks are not in order")
    return files


def _refuse_other_work(output_dir: Path, name: str, made_with: MadeWith, plans: dict[str, str], *, overwrite: bool) -> None:
    """Raise UserError over results of another stage, other settings or other inputs; with `overwrite` remove them."""
    marker = output_dir / "stage.json"
    if not marker.is_file():
        return
    found = read_json(marker)
    stale = [path.name for path in output_dir.glob("*.done.json") if path.name.removesuffix(".done.json") not in plans]
    changed = (found["stage"], found["config_hash"]) != (name, made_with.config_hash)
    if (changed or stale) and not overwrite:
        what = f"was made by {found['stage']} with {made_with.other(found)}"
        what = what if changed else f"holds {stale[0]}, whose input is gone"
        raise UserError(f"{output_dir}: {what}: choose another output directory, or overwrite=true to replace it")
    if changed or stale or (overwrite and not made_with.fits(marker, finished=is_finished(output_dir))):
        clear(output_dir)


def _take_ownership(output_dir: Path, name: str, made_with: MadeWith, plans: dict[str, str]) -> Ownership:
    output_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise UserError(f"{output_dir}: not writable")
    work = hashlib.sha256(json.dumps([name, made_with.config_hash, sorted(plans.items())]).encode()).hexdigest()
    return take_ownership(output_dir / "stage.json", work, stage=name, **made_with.to_json())


def is_finished(output_dir: Path) -> bool:
    """Whether a stage has finished all its files here."""
    return (output_dir / "summary.json").is_file() and read_summary(output_dir).complete


def clear(output_dir: Path) -> None:
    """Remove a stage's output and nothing else; the done files first, so that no moment looks complete."""
    forget_list(output_dir)
    for done in list(output_dir.glob("*.done.json")):
        done.unlink()
        done.with_name(done.name.removesuffix(".done.json")).unlink(missing_ok=True)
    for folder in ("dropped", "rejected", ".parts"):
        shutil.rmtree(output_dir / folder, ignore_errors=True)


def _drop_outdated(output_dir: Path, plans: dict[str, str], *, verify: bool) -> None:
    """Forget outputs whose input has changed since, or that are not as they were written; they are made again."""
    outdated: dict[Path, str] = {}
    listed = list_or_none(output_dir)
    for name, plan in plans.items():
        path = output_dir / f"{name}.done.json"
        if path.is_file():
            problem = problems_of_file(path, listed, verify=verify)
            if problem or read_json(path)["plan"] != plan:
                outdated[path] = problem or f"{name}: its input or its blocks have changed"
    if outdated:
        forget_list(output_dir)  # before anything goes: no moment looks complete
    for path, problem in outdated.items():
        log.warning("%s: it is made again", problem)
        path.unlink()


def _sweep(output_dir: Path) -> None:
    """Remove leftovers of killed runs, once all files are finished and nobody writes any more."""
    shutil.rmtree(output_dir / ".parts", ignore_errors=True)
    for folder in (output_dir, output_dir / "dropped", output_dir / "rejected"):
        for path in folder.glob(".tmp-*.jsonl.zst*"):
            path.unlink(missing_ok=True)


def _write_summary(
    stage: str,
    output_dir: Path,
    config_hash: str,
    files: dict[str, list[Block]],
    ownership: Ownership,
    finish: Callable[[], Mapping[Path, bool]],
    *,
    listed: bool,
) -> StageSummary:
    """Sum the done files; again if another part finished files meanwhile, so that the last writer has seen them all."""
    while True:
        names = [name for name in files if (output_dir / f"{name}.done.json").is_file()]
        total = add_counts([read_json(output_dir / f"{name}.done.json") for name in names])
        documents_in = total["kept"] + sum(total["rejected"].values())
        complete = len(names) == len(files)
        frequent = sorted(total["dropped_templates"].items(), key=lambda item: (-item[1], item[0]))[:MAX_TEMPLATE_NAMES]
        total["dropped_templates"] = dict(frequent)
        summary = StageSummary(stage, config_hash, len(names), len(files), complete, documents_in, **total)
        written_last = commit_by(ownership, finish) if complete else {}
        if complete and listed:
            records = {output_dir / f"{name}.done.json": True for name in files}
            summary = replace(summary, outputs=commit_by(ownership, _write_list, output_dir, {**records, **written_last}))
        # What an older version's summary lacks is absent, so that it stays as it is.
        absent = {"outputs": summary.outputs is None, "dropped_templates": not summary.dropped_templates}
        written = {name: value for name, value in asdict(summary).items() if not absent.get(name)}
        commit_by(ownership, write_json, output_dir / "summary.json", written)
        if len(names) == sum((output_dir / f"{name}.done.json").is_file() for name in files):
            break
    if not complete:
        log.info("%s: %d of %d files are complete; the other parts remain", stage, len(names), len(files))
    return summary


def _write_list(output_dir: Path, paths: Mapping[Path, bool]) -> dict[str, Any]:
    return write_list(output_dir, {str(p.relative_to(output_dir)): describe_file(p, summed=s) for p, s in paths.items()})
