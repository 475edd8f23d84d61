"""The files that a worker writes for a block, and how a file's blocks become the file. See run_stage.py for the whole."""

import contextlib
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import orjson
import xxhash
import zstandard

from megagpt.config import UserError
from megagpt.corpus.runner.blocks import Block, DroppedText, MalformedRecord, Process, Seen
from megagpt.corpus.runner.ownership import Ownership, commit, commit_by, folder_of
from megagpt.documents import Document, Rejected, format_document
from megagpt.files import atomic_path, read_json, sha256_file, write_json
from megagpt.terminal import without_secrets

SAMPLES_PER_REASON = 20
SAMPLE_CHARACTERS = 4000
EXAMPLES_PER_FAULT = 10


def commit_block(block: Block, output_dir: Path, process: Process, plan: str) -> dict[str, Any]:
    """In a worker: run `process`, write the block's documents, drops and samples, then its counts, which commit it."""
    part = _part(output_dir, block, plan)
    counts: dict[str, Any] = {"kept": 0, "characters_out": 0}
    rejected, faults, records, templates = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    examples: dict[str, list[str]] = {}
    samples: dict[str, list[tuple[int, Rejected]]] = {}
    with _part_frame(part.with_suffix(".kept")) as kept, _part_frame(part.with_suffix(".dropped")) as dropped:
        for outcome in process(block):
            match outcome:
                case Document():
                    kept.write(format_document(outcome))
                    counts["kept"] += 1
                    counts["characters_out"] += len(outcome.text)
                case Rejected(document, reason):
                    rejected[reason] += 1
                    dropped.write(_format_drop(document, reason))
                    _offer(samples.setdefault(reason, []), outcome)
                case MalformedRecord(kind, where):
                    faults[kind] += 1
                    if faults[kind] <= EXAMPLES_PER_FAULT:
                        examples.setdefault(kind, []).append(where)
                case Seen(kind, number):
                    records[kind] += number
                case DroppedText(template, number):
                    templates[template] += number
    with _part_frame(part.with_suffix(".samples")) as stream:
        for reason in sorted(samples):
            for item in _smallest(samples[reason]):
                stream.write(format_document(_as_sample(item[1])))
    counts |= {"rejected": dict(sorted(rejected.items())), "faults": dict(sorted(faults.items()))}
    counts |= {"fault_examples": examples, "records": dict(sorted(records.items()))}
    counts["dropped_templates"] = dict(sorted(templates.items()))
    write_json(part.with_suffix(".json"), counts)
    return counts


@contextlib.contextmanager
def _part_frame(path: Path) -> Iterator[Any]:
    """`_frame` of an unfinished file, in the folder of this work alone: it appears whole."""
    with atomic_path(path) as temporary, _frame(temporary) as stream:
        yield stream


@contextlib.contextmanager
def _frame(path: Path) -> Iterator[Any]:
    """A writer of one zstd frame, with checksum."""
    with path.open("wb") as raw:
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        # The buffer makes it one call per MiB instead of per document.
        with io.BufferedWriter(cast(io.RawIOBase, compressor.stream_writer(raw, closefd=False)), 1 << 20) as stream:
            yield stream


def _format_drop(document: Document, reason: str) -> bytes:
    value = {"id": document.id, "url": document.url, "reason": reason}
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _as_sample(rejected: Rejected) -> Document:
    document = rejected.document
    return replace(document, text=document.text[:SAMPLE_CHARACTERS], meta={**document.meta, "rejected": rejected.reason})


def _offer(samples: list[tuple[int, Rejected]], rejected: Rejected) -> None:
    """Keep the rejected documents with the smallest hashes: the same sample whatever the order of work."""
    samples.append((xxhash.xxh3_64_intdigest(rejected.document.id.encode("utf-8", "replace")), rejected))
    if len(samples) >= 4 * SAMPLES_PER_REASON:
        samples[:] = _smallest(samples)


def _smallest(samples: list[tuple[int, Rejected]]) -> list[tuple[int, Rejected]]:
    return sorted(samples, key=lambda item: (item[0], item[1].document.id))[:SAMPLES_PER_REASON]


def _part(output_dir: Path, block: Block, plan: str) -> Path:
    """Without its ending: .kept, .dropped, .samples, and .json, which says that the block is committed."""
    return folder_of(output_dir / ".parts" / block.name, plan) / f"{block.index:06d}"


def committed(output_dir: Path, block: Block, plan: str) -> dict[str, Any] | None:
    """The counts of a committed block, or None."""
    try:
        return json.loads(_part(output_dir, block, plan).with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def finish_file(stage: str, output_dir: Path, config_hash: str, plan: str, blocks: list[Block], ownership: Ownership) -> None:
    """Concatenate a file's blocks once all are committed. Two parts may do this at once: both write the same bytes.

    Raises UserError if another start has taken the folder for other work.
    """
    name = blocks[0].name
    if is_done(output_dir, name, plan):
        return
    parts = [committed(output_dir, block, plan) for block in blocks]
    if any(part is None for part in parts):
        return
    try:
        counts = add_counts([part for part in parts if part])
        input_name = Path(without_secrets(blocks[0].path)).name
        done = {"stage": stage, "config_hash": config_hash, "plan": plan, "input": input_name, **counts}
        merged = _merge(output_dir, plan, blocks, ownership)
        commit_by(ownership, write_json, output_dir / f"{name}.done.json", {**done, **merged})
    except FileNotFoundError:
        if not is_done(output_dir, name, plan):
            raise
    shutil.rmtree(folder_of(output_dir / ".parts" / name, plan), ignore_errors=True)


def _merge(output_dir: Path, plan: str, blocks: list[Block], ownership: Ownership) -> dict[str, Any]:
    """Write a file's three outputs from its blocks; returns where its frames begin, and sizes and sha256 of the outputs."""
    name, parts = blocks[0].name, [_part(output_dir, block, plan) for block in blocks]
    sizes = _concatenate(output_dir / name, [part.with_suffix(".kept") for part in parts], ownership)
    _concatenate(output_dir / "dropped" / name, [part.with_suffix(".dropped") for part in parts], ownership)
    _merge_samples(output_dir / "rejected" / name, [part.with_suffix(".samples") for part in parts], ownership)
    files = {str(path): _describe(output_dir / path) for path in (name, f"dropped/{name}", f"rejected/{name}")}
    return {"frames": [0, *itertools.accumulate(sizes)][:-1], "files": files}


def _concatenate(path: Path, parts: list[Path], ownership: Ownership) -> list[int]:
    with commit(path, ownership) as temporary, temporary.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
    return [part.stat().st_size for part in parts]


def _merge_samples(path: Path, parts: list[Path], ownership: Ownership) -> None:
    samples: dict[str, list[tuple[int, Rejected]]] = {}
    for document in itertools.chain.from_iterable(_read_frame(part) for part in parts):
        _offer(samples.setdefault(document.meta["rejected"], []), Rejected(document, document.meta["rejected"]))
    with commit(path, ownership) as temporary, _frame(temporary) as stream:
        for reason in sorted(samples):
            for item in _smallest(samples[reason]):
                stream.write(format_document(item[1].document))


def _read_frame(path: Path) -> Iterator[Document]:
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    for line in text.splitlines():
        value = orjson.loads(line)
        yield Document(value["id"], value["text"], value["source"], value["url"], value["meta"])


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def add_counts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several blocks or files as one; examples are the first ones in order."""
    total: dict[str, Any] = {key: sum(part[key] for part in parts) for key in ("kept", "characters_out")}
    for key in ("rejected", "faults", "records", "dropped_templates"):  # the last is missing in counts of before 0.2
        counter = Counter[str]()
        for part in parts:
            counter.update(part.get(key, {}))
        total[key] = dict(sorted(counter.items()))
    total["fault_examples"] = {
        kind: list(itertools.chain.from_iterable(part["fault_examples"].get(kind, []) for part in parts))[:EXAMPLES_PER_FAULT]
        for kind in total["faults"]
    }
    return total


def is_done(output_dir: Path, name: str, plan: str) -> bool:
    """Whether a file is finished, by this plan."""
    path = output_dir / f"{name}.done.json"
    try:
        return path.is_file() and read_json(path)["plan"] == plan
    except (UserError, KeyError, TypeError):  # damaged: run_stage names it and makes the file again
        return False
