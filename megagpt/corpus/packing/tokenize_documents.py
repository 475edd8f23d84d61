"""From documents to shards: split, tokenize, shuffle globally, write; in bounded memory, resumable, the same bytes always.

How it works. Every document gets a key, a hash of its id.
1. Blocks of the input are split and tokenized by workers into segments of at most 16 Mi tokens, sorted by key (segments.py).
   Training documents that are near duplicates of validation documents are left out (overlap.py).
2. The total says how many shards of `shard_tokens` there will be. Shard k of K holds the documents whose keys are in the k-th
   K-th of the 64-bit range: its worker looks up that range in every segment and merges, so the concatenation of all shards is
   the corpus in the order of keys. Neither blocks nor workers nor parts leave a trace in that order. With pack_seq_len
   documents then move a little so that samples cut few of them (best_fit.py).
3. When every shard is there the manifests are written, and the segments removed.

    output_dir/train/        manifest.json, shard_00000.bin, .idx, .docs.parquet, …
    output_dir/validation/   the same
    output_dir/tokenizer/    a copy of the tokenizer, so that the folder is whole by itself
    output_dir/leaks.jsonl   training documents that were left out, each with the validation document it resembles
    output_dir/malformed.jsonl  of rows of fine-tuning data: those that were left out, each with file, line and what is wrong
    output_dir/outputs.json  size and sha256 of all of these, and the manifests once more (output_list.py)
    output_dir/summary.json  counts, and the sum of outputs.json; written last
With separate_sources each source has such a folder below output_dir.
"""

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megagpt.config import UserError
from megagpt.corpus.packing.best_fit import best_fit_order, pack_whole
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.segments import SPLITS, Job, cached_tokenizer, tokenize_blocks
from megagpt.corpus.packing.supervised import tokenizer_for
from megagpt.corpus.runner.blocks import Block, document_blocks, plan_hash
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.executors import run_tasks
from megagpt.corpus.runner.ownership import (
    Ownership,
    commit,
    commit_by,
    folder_of,
    is_of_other_work,
    take_ownership,
    work_of,
)
from megagpt.corpus.runner.progress import Progress
from megagpt.data.arrow import number_column, numbers_of
from megagpt.data.shards import (
    CLASSES_FORMAT,
    SUPERVISED_FORMAT,
    Manifest,
    ShardError,
    ShardInfo,
    ShardWriter,
    manifest_json,
    parse_manifest,
    read_manifest,
    token_dtype,
    verify_shard,
    write_manifest,
)
from megagpt.files import read_json, write_json
from megagpt.output_list import describe_file, forget_list, list_or_none, problem_of, write_list
from megagpt.settings_record import MadeWith, fingerprint
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.hugging_face import HuggingFaceTokenizer

__all__ = ["PackSummary", "TokenizeConfig", "describe", "pack_documents"]

FORMAT = 2
"""Of the stage; it grows when the same settings give other shards, or files of another form."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackSummary:
    """Counts of the shards, by folder and split; `complete` is false while other parts run."""

    complete: bool
    splits: dict[str, dict[str, int]]
    """`<folder>/<split>` -> shards, documents, tokens, bytes."""
    empty_documents: int = 0
    leaked_documents: int = 0
    """Training documents dropped as too similar to a validation document; leaks.jsonl lists them."""
    rows: dict[str, Any] | None = None
    """Of rows of fine-tuning data: malformed (by kind), truncated, padding (tokens). None: documents."""
    outputs: dict[str, Any] | None = None
    """Size and sha256 of outputs.json; None: unfinished, or made by an earlier release."""


def pack_documents(
    inputs: Sequence[Path], output_dir: Path, tokenizer_path: str | Path, config: TokenizeConfig, execution: Execution
) -> PackSummary:
    """Tokenize document files into shards under `output_dir`. A rerun resumes where the last one stopped.

    Missing or damaged finished shards are made again, and only those: sizes are compared, with execution.verify sums.
    Raises UserError if output_dir holds shards of other inputs or settings (unless overwrite), or the tokenizer does not suit.
    """
    tokenizer = cached_tokenizer(str(tokenizer_path), config.encoder, config.pattern)
    if config.supervised is not None:
        tokenizer = tokenizer_for(tokenizer, config.supervised)
    if config.require_lossless and not tokenizer.lossless:
        losses = f" ({tokenizer.losses})" if isinstance(tokenizer, HuggingFaceTokenizer) else ""
        raise UserError(f"tokenizer {tokenizer_path}: it rewrites or drops text{losses}; require_lossless=false accepts it")
    blocks = document_blocks(inputs)
    paths = {block.name: block.path for block in blocks}
    for block in blocks:
        if block.path != paths[block.name]:
            raise UserError(f"{block.path} and {paths[block.name]} have the same file name: rename one")
    if not blocks:
        raise UserError(f"{output_dir}: no input documents")
    made_with = MadeWith(
        _plan(blocks, tokenizer, config), "tokenize", _shaping(config), {"tokenizer": tokenizer.fingerprint}, FORMAT
    )
    ownership = _take_ownership(output_dir, made_with, overwrite=execution.overwrite)
    if (output_dir / "summary.json").is_file() and _is_whole(output_dir, tokenizer, verify=execution.verify):
        log.info("%s: complete", output_dir)
        _sweep(output_dir)
        return PackSummary(**read_json(output_dir / "summary.json"))
    job = Job(
        str(folder_of(output_dir / ".segments", ownership.work)),
        str(tokenizer_path),
        ownership,
        config,
        token_dtype(tokenizer.vocab_size).newbyteorder("=").name,
    )
    try:
        with work_of(ownership):
            records = tokenize_blocks(blocks, job, execution)
            if records is not None:
                folders = _folders(records, config)
                kept = _sound_shards(output_dir, tokenizer, config)
                shards = _write_shards(records, folders, output_dir, job, execution, kept)
                return _finish(output_dir, tokenizer, job, folders, shards, records)
    except (FileNotFoundError, UserError):
        if is_of_other_work(ownership.marker, ownership.work):
            raise
        # Another part may have finished everything, and removed the segments, in the meantime.
        if not (output_dir / "summary.json").is_file():
            raise
    if (output_dir / "summary.json").is_file():
        return PackSummary(**read_json(output_dir / "summary.json"))
    return PackSummary(False, {})


# ---- what is done already


def _plan(blocks: Sequence[Block], tokenizer: Tokenizer, config: TokenizeConfig) -> str:
    files: dict[str, list[Block]] = {}
    for block in blocks:
        files.setdefault(block.path, []).append(block)
    content = [plan_hash("", group) for group in files.values()]
    return hashlib.sha256(json.dumps([fingerprint(_shaping(config)), tokenizer.fingerprint, content]).encode()).hexdigest()


def _shaping(config: TokenizeConfig) -> TokenizeConfig:
    """The settings that shape the shards: not where inputs and tokenizer lie (their contents are hashed apart)."""
    return config.model_copy(update={"inputs": (), "tokenizer": None, "pattern": None, "encoder": "tiktoken"})


def _take_ownership(output_dir: Path, made_with: MadeWith, *, overwrite: bool) -> Ownership:
    marker = output_dir / "stage.json"
    finished, is_other = (output_dir / "summary.json").is_file(), is_of_other_work(marker, made_with.config_hash)
    if is_other and not overwrite:
        what = f"holds shards made with {made_with.other(read_json(marker))}"
        raise UserError(f"{output_dir}: {what}: choose another output directory, or overwrite=true to replace them")
    if not is_other and made_with.keeps(marker, finished=finished, overwrite=overwrite):
        return Ownership(marker, made_with.config_hash)
    if is_other or not made_with.fits(marker, finished=finished):
        forget_list(output_dir)
        for manifest in [*output_dir.glob("*/manifest.json"), *output_dir.glob("*/*/manifest.json")]:
            manifest.unlink()
        for index in [*output_dir.glob("*/shard_*.idx"), *output_dir.glob("*/*/shard_*.idx")]:
            shutil.rmtree(index.parent, ignore_errors=True)  # also those of a run that ended before its manifests
        shutil.rmtree(output_dir / ".segments", ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    return take_ownership(marker, made_with.config_hash, stage="shards", **made_with.to_json())


def _is_whole(output_dir: Path, tokenizer: Tokenizer, *, verify: bool) -> bool:
    """Whether finished shards are as they were written. Lost manifests and tokenizers are put back; what else is missing is
    named, and the folder is no longer finished."""
    listed = list_or_none(output_dir)
    if not (output_dir / "summary.json").is_file():
        return False
    for name, entry in (listed or {}).items():
        if problem_of(output_dir / name, entry, verify=True) if "content" in entry or "/tokenizer/" in f"/{name}" else "":
            log.warning("%s: it is written again", output_dir / name)
            if "content" in entry:
                write_json(output_dir / name, entry["content"])
            else:
                tokenizer.save((output_dir / name).parent)
    problems = shard_problems(output_dir, listed, verify=verify)
    if problems:
        forget_list(output_dir)
    for problem in problems:
        log.warning("%s: it is made again", problem)
    return not problems


def shard_problems(output_dir: Path, listed: dict[str, dict[str, Any]] | None, *, verify: bool) -> list[str]:
    """What is missing of finished shards or differs from what was written; without a list as far as the manifests tell."""
    found = [problem_of(output_dir / name, entry, verify=verify) for name, entry in (listed or {}).items()]
    for split in read_json(output_dir / "summary.json")["splits"]:
        try:
            manifest = read_manifest(output_dir / split)
            shards = manifest.shards if verify else ()
            found += [text for info in shards for text in verify_shard(output_dir / split, info, manifest.dtype)]
        except ShardError as error:
            found.append(str(error))
    return [problem for problem in dict.fromkeys(found) if problem]


def _sound_shards(output_dir: Path, tokenizer: Tokenizer, config: TokenizeConfig) -> dict[Path, ShardInfo]:
    """The shards of these settings that manifests know and that are as they were written, by path without ending."""
    sound, settings = {}, fingerprint(_shaping(config))
    for path in [*output_dir.glob("*/manifest.json"), *output_dir.glob("*/*/manifest.json")]:
        try:
            manifest = parse_manifest(path)
        except ShardError:
            continue
        if (manifest.config_sha256, manifest.tokenizer_sha256) == (settings, tokenizer.fingerprint):
            infos = (info for info in manifest.shards if not any(verify_shard(path.parent, info, manifest.dtype)))
            sound.update({path.parent / info.name: info for info in infos})
    return sound


# ---- merge into shards


def _folders(records: list[dict[str, Any]], config: TokenizeConfig) -> dict[str, str]:
    """Source -> folder below output_dir ("" = itself). Raises UserError if two sources would share one."""
    if not config.separate_sources:
        return {"": ""}
    sources = sorted({segment["source"] for record in records for segment in record["segments"]})
    folders = {source: re.sub(r"[^A-Za-z0-9._-]+", "_", source).strip("._") or "unnamed" for source in sources}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"separate_sources: the sources {sources} do not all have folder names of their own")
    return folders


def _write_shards(
    records: list[dict[str, Any]],
    folders: dict[str, str],
    output_dir: Path,
    job: Job,
    execution: Execution,
    kept: dict[Path, ShardInfo],
) -> dict[tuple[str, str], list[ShardInfo]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {(source, split): [] for source in folders for split in SPLITS}
    for record in records:
        for segment in record["segments"]:
            groups[segment["source"], segment["split"]].append(segment)
    tasks = []
    for (source, split), segments in groups.items():
        tokens = sum(segment["tokens"] for segment in segments)
        count = -(-tokens // job.config.shard_tokens)
        names = [segment["name"] for segment in segments]
        first_tokens = _first_tokens(names, count, job) if job.config.pack_seq_len else [0] * count
        directory = output_dir / folders[source] / split
        tasks += [((source, split, k), (directory, k, count, first_tokens[k], names, job)) for k in range(count)]
    index, parts = execution.part_of
    # Parts that come here together begin at different shards; one that is there already is not written again.
    order = sorted(range(len(tasks)), key=lambda i: ((i - index) % parts, i))
    sound = {key: kept.get(directory / f"shard_{k:05d}") for key, (directory, k, *_) in tasks}
    todo = [(tasks[i][0], _write_shard, tasks[i][1]) for i in order if sound[tasks[i][0]] is None]
    found = {key: info for key, info in sound.items() if info is not None}
    size = sum(segment["tokens"] for segments in groups.values() for segment in segments) * np.dtype(job.dtype).itemsize
    with Progress("shards", size) as progress:

        def consume(key: tuple[str, str, int], info: ShardInfo) -> None:
            found[key] = info
            progress.add(info.bin_bytes, documents=info.documents)

        if todo:
            run_tasks(todo, execution, consume, lambda key: f"shard {key[2]} of {key[0]} {key[1]}")
    return {
        group: [found[(*group, k)] for k in range(sum(key[:2] == group for key in found))] for group in groups
    }  # fmt: skip


def _first_tokens(names: list[str], count: int, job: Job) -> list[int]:
    """The number of each shard's first token in its split."""
    totals = np.zeros(count, np.int64)
    for segment in names:
        table = _rows(job, segment)
        keys, tokens = (numbers_of(table[column]) for column in ("key", "tokens"))
        ends = np.concatenate([[0], np.cumsum(tokens)])
        bounds = [_first_row(keys, k, count) for k in range(count + 1)]
        totals += np.diff(ends[bounds])
    return [0, *np.cumsum(totals).tolist()][:-1]


def _rows(job: Job, segment: str) -> Any:
    import pyarrow as pa

    with pa.memory_map(f"{job.segments}/{segment}.arrow") as file:
        return pa.ipc.open_file(file).read_all()


def _first_row(keys: np.ndarray, number: int, count: int) -> int:
    """Where in ascending keys the rows of shard `number` of `count` begin."""
    return len(keys) if number == count else int(np.searchsorted(keys, np.uint64(number * 2**64 // count)))


def _write_shard(directory: Path, number: int, count: int, first_token: int, names: list[str], job: Job) -> ShardInfo:
    """Merge one range of keys out of all segments into a shard, unless it is there already."""
    import pyarrow as pa

    name = f"shard_{number:05d}"
    record = Path(job.segments) / f"{directory.parent.name}-{directory.name}-{name}.json"
    if record.is_file():
        info = ShardInfo(**read_json(record))
        if all((directory / f"{name}{suffix}").is_file() for suffix in info.suffixes):
            return info
    tables, sources, marks = [], [], []
    supervised, seq_len, eot_id = job.config.supervised, job.config.pack_seq_len or 0, None
    if supervised is not None and supervised.classes:  # other rows end with it themselves
        eot_id = cached_tokenizer(job.tokenizer, job.config.encoder, job.config.pattern).eot_id
    for segment in names:
        table = _rows(job, segment)
        keys = numbers_of(table["key"])
        first, last = _first_row(keys, number, count), _first_row(keys, number + 1, count)
        if last > first:
            tables.append(table.slice(first, last - first))
            sources.append(np.memmap(f"{job.segments}/{segment}.tokens", job.dtype, "r"))
            if supervised is not None:
                marks.append(np.memmap(f"{job.segments}/{segment}.targets", np.bool_, "r"))
    with ShardWriter(directory, name, np.dtype(job.dtype), masked=supervised is not None) as writer:
        if tables:
            origin = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
            rows = pa.concat_tables(tables)
            order = np.argsort(numbers_of(rows["key"]), kind="stable")
            padding = np.zeros(len(order), np.int64)
            if supervised is not None:
                order, padding = _whole_rows(order, numbers_of(rows["tokens"]), seq_len, packed=supervised.padding == "packed")
            elif job.config.pack_seq_len:
                order = order[best_fit_order(numbers_of(rows["tokens"])[order], job.config.pack_seq_len, first_token)]
            for begin in range(0, len(order), 1024):
                chosen = order[begin : begin + 1024]
                part = rows.take(number_column(chosen))
                lengths, starts = numbers_of(part["tokens"]), numbers_of(part["start"])
                pieces = [sources[origin[i]][s : s + n] for i, s, n in zip(chosen, starts, lengths, strict=True)]
                columns = {column: part[column].to_pylist() for column in ("id", "url", "source", "bytes")}
                if supervised is None:
                    writer.add_many(np.concatenate(pieces), lengths, columns)
                    continue
                filling = padding[begin : begin + 1024]
                pieces = [
                    np.pad(piece, (0, n), constant_values=piece[-1] if eot_id is None else eot_id)
                    for piece, n in zip(pieces, filling, strict=True)
                ]
                targets = [
                    np.pad(marks[origin[i]][s : s + n], (0, more))
                    for i, s, n, more in zip(chosen, starts, lengths, filling, strict=True)
                ]
                writer.add_many(np.concatenate(pieces), lengths + filling, columns, np.concatenate(targets))
        info = commit_by(job.ownership, writer.close)
    write_json(record, asdict(info))
    return info


def _whole_rows(order: np.ndarray, lengths: np.ndarray, seq_len: int, *, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows in their new order, how many end-of-text tokens behind each): every sample of seq_len tokens holds whole rows, and
    the padding of a sample belongs to its last row."""
    samples = pack_whole(lengths[order], seq_len) if packed else [[i] for i in range(len(order))]
    placed = order[[row for sample in samples for row in sample]]
    padding = np.zeros(len(order), np.int64)
    lasts = np.cumsum([len(sample) for sample in samples]) - 1
    padding[lasts] = [seq_len - int(lengths[order[sample]].sum()) for sample in samples]
    return placed, padding


def _finish(
    output_dir: Path,
    tokenizer: Tokenizer,
    job: Job,
    folders: dict[str, str],
    shards: dict[tuple[str, str], list[ShardInfo]],
    records: list[dict[str, Any]],
) -> PackSummary:
    supervised = job.config.supervised
    of_rows: Any = {} if supervised is None else {"format": SUPERVISED_FORMAT, "supervised": supervised.padding}
    if supervised is not None and supervised.classes:
        of_rows = {"format": CLASSES_FORMAT, "supervised": supervised.padding, "classes": supervised.classes}
    config, dtype, splits = job.config, token_dtype(tokenizer.vocab_size).name, {}
    outputs: dict[str, dict[str, Any]] = {}
    settings_hash = fingerprint(_shaping(config))
    for source, folder in folders.items():
        commit_by(job.ownership, tokenizer.save, output_dir / folder / "tokenizer")
        for split in SPLITS:
            infos, directory = tuple(shards[source, split]), output_dir / folder / split
            directory.mkdir(parents=True, exist_ok=True)
            manifest = Manifest(
                split, dtype, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.fingerprint, settings_hash, infos,
                pack_seq_len=config.pack_seq_len, **of_rows,
            )  # fmt: skip
            commit_by(job.ownership, write_manifest, directory, manifest)
            outputs |= _listed(directory, manifest, output_dir)
            splits[f"{folder}/{split}".lstrip("/")] = {
                "shards": len(infos), "documents": manifest.documents, "tokens": manifest.tokens, "bytes": manifest.text_bytes,
            }  # fmt: skip
            if config.supervised is not None:
                splits[f"{folder}/{split}".lstrip("/")]["targets"] = sum(info.targets or 0 for info in infos)
    _write_overlaps(records, output_dir, job.ownership)
    rows = _write_malformed(records, output_dir, splits, job.ownership) if config.supervised is not None else None
    empty, leaked = (sum(record["empty"] for record in records), sum(len(record["leaks"]) for record in records))
    lists = [output_dir / name for name in ("leaks.jsonl", *(() if rows is None else ("malformed.jsonl",)))]
    paths = [*lists, *(p for f in folders.values() for p in (output_dir / f / "tokenizer").iterdir())]
    outputs |= {str(path.relative_to(output_dir)): describe_file(path) for path in paths}
    listed = commit_by(job.ownership, write_list, output_dir, outputs)
    summary = PackSummary(True, splits, empty, leaked, rows, listed)
    written = {name: v for name, v in asdict(summary).items() if name != "rows" or rows is not None}
    commit_by(job.ownership, write_json, output_dir / "summary.json", written)
    _sweep(output_dir)
    return summary


def _listed(directory: Path, manifest: Manifest, output_dir: Path) -> dict[str, dict[str, Any]]:
    """What outputs.json says of a split. Tokens are summed in the manifest, block by block; it is kept, so that it can be put
    back without tokenizing."""
    folder = directory.relative_to(output_dir)
    entries = {f"{folder}/manifest.json": {**describe_file(directory / "manifest.json"), "content": manifest_json(manifest)}}
    for info in manifest.shards:
        entries[f"{folder}/{info.name}.bin"] = {"bytes": info.bin_bytes, "sha256": None}
        entries[f"{folder}/{info.name}.idx"] = {"bytes": info.idx_bytes, "sha256": info.idx_sha256}
        entries[f"{folder}/{info.name}.docs.parquet"] = {"bytes": info.docs_bytes, "sha256": info.docs_sha256}
        if info.mask_sha256 is not None:
            entries[f"{folder}/{info.name}.mask"] = {"bytes": info.mask_bytes, "sha256": info.mask_sha256}
    return entries


def _write_overlaps(records: list[dict[str, Any]], output_dir: Path, ownership: Ownership) -> None:
    """leaks.jsonl: a line per training document that was left out for its likeness to a validation document."""
    with commit(output_dir / "leaks.jsonl", ownership) as temporary, temporary.open("wb") as file:
        for record in records:
            for overlap in record["leaks"]:
                file.write(orjson.dumps(overlap, option=orjson.OPT_APPEND_NEWLINE))


def _write_malformed(
    records: list[dict[str, Any]], output_dir: Path, splits: dict[str, dict[str, int]], ownership: Ownership
) -> dict[str, Any]:
    """malformed.jsonl: a line per row that was left out; returns what the summary says of the rows."""
    malformed = [row for record in records for row in record["malformed"]]
    with commit(output_dir / "malformed.jsonl", ownership) as temporary, temporary.open("wb") as file:
        for row in malformed:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    kept = sum(segment["tokens"] for record in records for segment in record["segments"])
    return {
        "malformed": dict(sorted(Counter(row["kind"] for row in malformed).items())),
        "truncated": sum(record["truncated"] for record in records),
        "padding": sum(counts["tokens"] for counts in splits.values()) - kept,
    }


def _sweep(output_dir: Path) -> None:
    """Remove the segments, and what killed runs left unfinished."""
    shutil.rmtree(output_dir / ".segments", ignore_errors=True)
    for leftover in list(output_dir.rglob(".tmp-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def describe(summary: PackSummary, output_dir: Path) -> str:
    """What a tool prints at the end."""
    if not summary.complete:
        return f"{output_dir}: this part is done, others are not: run the same command once more when they are"
    lines = [
        f"{output_dir / name}: {counts['tokens']:,} tokens in {counts['shards']} shards, {counts['documents']:,} documents, "
        f"{counts['bytes'] / max(counts['tokens'], 1):.2f} bytes per token"
        for name, counts in summary.splits.items()
    ]
    if summary.rows is not None:
        found, total = summary.rows, sum(counts["tokens"] for counts in summary.splits.values())
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found["malformed"].items())
        lines.append(
            f"rows: {sum(counts['targets'] for counts in summary.splits.values()):,} targets, "
            f"{found['truncated']:,} truncated, "
            f"{found['padding'] / max(total, 1):.1%} padding, {sum(found['malformed'].values()):,} malformed"
            + (f" ({kinds}; {output_dir / 'malformed.jsonl'})" if kinds else "")
        )
    if summary.leaked_documents:
        where = output_dir / "leaks.jsonl"
        lines.append(
            f"{summary.leaked_documents:,} training documents dropped as too similar to validation documents ({where})"
        )
    return "\n".join(lines)
