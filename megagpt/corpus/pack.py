"""From documents to shards: split, tokenize, shuffle globally, write; in bounded memory, resumable, the same bytes always.

How it works. Every document gets a key, a hash of its id.
1. Blocks of the input are tokenized by workers into segments: at most 16 Mi tokens, sorted by key, as flat tokens
   (`.tokens`) and a memory-mapped Arrow table of rows (`.arrow`). A block's small .json comes last and means "committed".
2. The total says how many shards of `shard_tokens` there will be. Shard k of K holds the documents whose keys lie in the k-th
   K-th of the 64-bit range: its worker looks up that range in every segment and merges, so the concatenation of all shards is
   the corpus in the order of keys. Neither blocks nor workers nor parts leave a trace in that order.
3. When every shard is there the manifests are written, and the segments removed.

    output_dir/train/        manifest.json, shard_00000.bin, .idx, .docs.parquet, …
    output_dir/validation/   the same
    output_dir/tokenizer/    a copy of the tokenizer, so that the folder is whole by itself
    output_dir/summary.json  what there is
With separate_sources each source has such a folder below output_dir.
"""

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import Field

from megagpt.byte_pairs import Encoder
from megagpt.config import Config, UserError, fingerprint
from megagpt.corpus.blocks import Block, document_blocks, num_bytes, plan_hash, read_block
from megagpt.corpus.executors import Execution, run_tasks
from megagpt.corpus.progress import Progress
from megagpt.documents import Document
from megagpt.files import atomic_path, read_json, write_json
from megagpt.shards import Manifest, ShardInfo, ShardWriter, token_dtype, write_manifest
from megagpt.tokenizer import Tokenizer, open_tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
SEGMENT_TOKENS, SEGMENT_DOCUMENTS = 16 << 20, 1 << 19
BATCH_CHARACTERS = 1 << 20
SPLIT_SEED = 0x5EED
"""The split hashes ids with a seed of its own: it is independent of the order, and never moves when data or settings change."""


class TokenizeConfig(Config):
    """Settings of `tools/tokenize_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files (.jsonl, .jsonl.gz, .jsonl.zst) or globs; empty = the output of deduplication."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer; null = the one that tools/train_tokenizer.py left in work_dir/tokenizer."""
    encoder: Encoder = "tiktoken"
    """What encodes byte-level BPE: tiktoken, or fastokens (several times as fast; compared with tiktoken at every start)."""
    split_by: Literal["hash", "tail"] = "hash"
    """hash: validation documents are chosen by a hash of their id, and stay chosen when data is added. tail: the last part of
    each source's text, in the order of the files, counted in characters; the document at the cut is cut in two."""
    validation_fraction: float = Field(default=0.005, ge=0, lt=1)
    """Share of the documents (hash) or of each source's characters (tail) that goes to validation."""
    separate_sources: bool = False
    """One folder of shards per document source, to weigh them in training and to see a validation loss for each."""
    shard_tokens: int = Field(default=1 << 27, ge=1)
    """Tokens in a shard, about; one worker holds the rows of one shard in memory, not its tokens."""
    seed: int = Field(default=0, ge=0)
    """Key of the global order of documents."""
    require_lossless: bool = True
    """Refuse a tokenizer that rewrites or drops text (a SentencePiece model without byte fallback, or with NFKC)."""


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What lies in the shards, by folder and split; `complete` is false while other parts are at work."""

    complete: bool
    splits: dict[str, dict[str, int]]
    """`<folder>/<split>` -> shards, documents, tokens, bytes."""
    empty_documents: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """What every worker needs to know; small and picklable."""

    segments: str
    tokenizer: str
    plan: str
    config: TokenizeConfig
    dtype: str


def pack_documents(
    inputs: Sequence[Path], output_dir: Path, tokenizer_path: str | Path, config: TokenizeConfig, execution: Execution
) -> PackSummary:
    """Tokenize document files into shards under `output_dir`. A rerun goes on where the last one stopped.

    Raises UserError if output_dir holds shards of other inputs or settings (unless overwrite), or the tokenizer does not suit.
    """
    tokenizer = open_tokenizer(tokenizer_path, config.encoder)
    if config.require_lossless and not tokenizer.lossless:
        raise UserError(f"tokenizer {tokenizer_path}: it rewrites or drops text; require_lossless=false takes it all the same")
    blocks = document_blocks(inputs)
    if not blocks:
        raise UserError(f"{output_dir}: no input documents")
    plan = _plan(blocks, tokenizer, config)
    _claim(output_dir, plan, overwrite=execution.overwrite)
    if (output_dir / "summary.json").is_file():
        log.info("%s: complete", output_dir)
        _sweep(output_dir)
        return PackSummary(**read_json(output_dir / "summary.json"))
    job = _Job(
        str(output_dir / ".segments"),
        str(tokenizer_path),
        plan,
        config,
        token_dtype(tokenizer.vocab_size).newbyteorder("=").name,
    )
    try:
        records = _tokenize(blocks, job, execution)
        if records is not None:
            folders = _folders(records, config)
            shards = _write_shards(records, folders, output_dir, job, execution)
            empty = sum(record["empty"] for record in records)
            return _finish(output_dir, tokenizer, config, folders, shards, empty)
    except (FileNotFoundError, UserError):
        # Another part may have finished everything, and removed the segments, in the meantime.
        if not (output_dir / "summary.json").is_file():
            raise
    if (output_dir / "summary.json").is_file():
        return PackSummary(**read_json(output_dir / "summary.json"))
    return PackSummary(False, {})


def _tokenize(blocks: Sequence[Block], job: _Job, execution: Execution) -> list[dict[str, Any]] | None:
    """The records of all blocks, tokenized; None while those of other parts are missing."""
    cuts: dict[str, dict[str, int]] | None = {}
    if job.config.split_by == "tail":
        cuts = _tail_cuts(blocks, job, execution)
    if cuts is None or not _each_block("tokenize", blocks, job, execution, _tokenize_block, cuts):
        return None
    return [read_json(_record(job, block, "tokenize")) for block in blocks]


# ---- what is done already


def _plan(blocks: Sequence[Block], tokenizer: Tokenizer, config: TokenizeConfig) -> str:
    files: dict[str, list[Block]] = {}
    for block in blocks:
        files.setdefault(block.path, []).append(block)
    content = [plan_hash("", group) for group in files.values()]
    return hashlib.sha256(json.dumps([_settings_hash(config), tokenizer.fingerprint, content]).encode()).hexdigest()


def _settings_hash(config: TokenizeConfig) -> str:
    """Of the settings that shape the shards: not where inputs and tokenizer lie (their contents are hashed apart)."""
    return fingerprint(config.model_copy(update={"inputs": (), "tokenizer": None, "encoder": "tiktoken"}))


def _claim(output_dir: Path, plan: str, *, overwrite: bool) -> None:
    marker = output_dir / "stage.json"
    if marker.is_file() and read_json(marker).get("plan") != plan:
        if not overwrite:
            what = "holds shards made from other documents, with another tokenizer or other settings"
            raise UserError(f"{output_dir}: {what}: choose another output directory, or overwrite=true to replace them")
        (output_dir / "summary.json").unlink(missing_ok=True)
        for manifest in [*output_dir.glob("*/manifest.json"), *output_dir.glob("*/*/manifest.json")]:
            manifest.unlink()
            shutil.rmtree(manifest.parent)
        shutil.rmtree(output_dir / ".segments", ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"stage": "shards", "plan": plan})


def _record(job: _Job, block: Block, phase: str) -> Path:
    return Path(job.segments) / block.name / f"{block.index:06d}.{phase}.json"


def _each_block(label: str, blocks: Sequence[Block], job: _Job, execution: Execution, work: Any, extra: Any) -> bool:
    """Run `work` on this part's blocks that are not committed; True when the blocks of all parts are."""
    index, count = execution.part_of
    mine = blocks[index::count]
    todo = [block for block in mine if not _record(job, block, label).is_file()]
    with Progress(label, sum(map(num_bytes, todo)), skipped=len(mine) - len(todo)) as progress:

        def consume(block: Block, documents: int) -> None:
            progress.add(num_bytes(block), documents=documents)

        if todo:
            tasks = [(block, work, (block, job, extra)) for block in todo]
            run_tasks(tasks, execution, consume, lambda block: f"{block.path} from byte {block.start}")
    missing = [block for block in blocks if not _record(job, block, label).is_file()]
    if missing:
        log.info(
            "%s: %d of %d blocks remain for the other parts; run once more when they are done", label, len(missing), len(blocks)
        )
    return not missing


# ---- split


def _tail_cuts(blocks: Sequence[Block], job: _Job, execution: Execution) -> dict[str, dict[str, int]] | None:
    """For the split by tail: per block record and source, how many more characters go to train. None: other parts remain."""
    if not _each_block("count", blocks, job, execution, _count_block, None):
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


def _count_block(block: Block, job: _Job, _: None) -> int:
    characters, documents = Counter[str](), 0
    for document in read_block(block):
        characters[document.source] += len(document.text)
        documents += 1
    write_json(_record(job, block, "count"), dict(characters))
    return documents


def _split(documents: Iterator[Document], config: TokenizeConfig, left: dict[str, int]) -> Iterator[tuple[str, Document, str]]:
    """(split, document, text): the split by tail may cut a document in two."""
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


# ---- tokenize into segments


@lru_cache(maxsize=1)
def _tokenizer(path: str, encoder: Encoder) -> Tokenizer:
    return open_tokenizer(path, encoder)


class _Segments:
    """The segments of one block: rows and tokens by (source folder, split), written out sorted whenever they are many."""

    def __init__(self, block: Block, job: _Job) -> None:
        self.job, self.stem = job, f"{block.name}/{block.index:06d}"
        self.written: list[dict[str, Any]] = []
        self._rows: dict[tuple[str, str], dict[str, list[Any]]] = {}
        self._tokens = self._documents = 0

    def add(self, split: str, document: Document, ids: np.ndarray, text_bytes: int, eot_id: int) -> None:
        source = document.source if self.job.config.separate_sources else ""
        rows = self._rows.setdefault((source, split), {name: [] for name in ("key", "id", "url", "source", "bytes", "ids")})
        rows["key"].append(xxhash.xxh3_64_intdigest(document.id.encode(), seed=self.job.config.seed))
        rows["id"].append(document.id)
        rows["url"].append(document.url)
        rows["source"].append(document.source)
        rows["bytes"].append(text_bytes)
        rows["ids"].append(np.append(ids.astype(self.job.dtype), np.array(eot_id, self.job.dtype)))
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
            lengths = np.array([len(x) for x in ids], np.int64)
            columns = {column: pa.array([rows[column][i] for i in order], type=kind) for column, kind in _row_types().items()}
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            table = pa.table({**columns, "tokens": pa.array(lengths), "start": pa.array(starts)})
            with atomic_path(Path(self.job.segments) / f"{name}.tokens") as temporary, temporary.open("wb") as file:
                for piece in ids:
                    file.write(piece.tobytes())
            with atomic_path(Path(self.job.segments) / f"{name}.arrow") as temporary:
                with pa.ipc.new_file(str(temporary), table.schema) as writer:
                    writer.write_batch(table.combine_chunks().to_batches()[0])
            self.written.append({"name": name, "source": source, "split": split, "tokens": int(lengths.sum())})
        self._rows, self._tokens, self._documents = {}, 0, 0


def _row_types() -> dict[str, Any]:
    import pyarrow as pa

    return {"key": pa.uint64(), "id": pa.string(), "url": pa.string(), "source": pa.string(), "bytes": pa.int64()}


def _tokenize_block(block: Block, job: _Job, cuts: dict[str, dict[str, int]]) -> int:
    tokenizer = _tokenizer(job.tokenizer, job.config.encoder)
    segments, empty, documents = _Segments(block, job), 0, 0
    left = dict(cuts.get(f"{block.name}/{block.index}", {}))
    for batch in _batches(_split(read_block(block), job.config, left)):
        batch_ids = tokenizer.encode_batch([text for _, _, text in batch])
        for (split, document, text), ids in zip(batch, batch_ids, strict=True):
            if not text:
                empty += 1
                continue
            segments.add(split, document, ids, len(text.encode()), tokenizer.eot_id)
            documents += 1
    segments.flush()
    write_json(_record(job, block, "tokenize"), {"segments": segments.written, "documents": documents, "empty": empty})
    return documents


def _batches(items: Iterator[tuple[str, Document, str]]) -> Iterator[list[tuple[str, Document, str]]]:
    batch: list[tuple[str, Document, str]] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item[2])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
    records: list[dict[str, Any]], folders: dict[str, str], output_dir: Path, job: _Job, execution: Execution
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
        tasks += [((source, split, k), (output_dir / folders[source] / split, k, count, names, job)) for k in range(count)]
    index, parts = execution.part_of
    # Parts that come here together begin at different shards; one that is there already is not written again.
    order = sorted(range(len(tasks)), key=lambda i: ((i - index) % parts, i))
    todo = [(tasks[i][0], _write_shard, tasks[i][1]) for i in order]
    found: dict[tuple[str, str, int], ShardInfo] = {}
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


def _write_shard(directory: Path, number: int, count: int, names: list[str], job: _Job) -> ShardInfo:
    """Merge one range of keys out of all segments into a shard, unless it is there already."""
    import pyarrow as pa

    name = f"shard_{number:05d}"
    record = Path(job.segments) / f"{directory.parent.name}-{directory.name}-{name}.json"
    if record.is_file():
        info = ShardInfo(**read_json(record))
        if all((directory / f"{name}{suffix}").is_file() for suffix in (".bin", ".idx", ".docs.parquet")):
            return info
    low, high = number * 2**64 // count, (number + 1) * 2**64 // count
    tables, sources = [], []
    for segment in names:
        with pa.memory_map(f"{job.segments}/{segment}.arrow") as file:
            table = pa.ipc.open_file(file).read_all()
        keys = table["key"].chunk(0).to_numpy()
        first = int(np.searchsorted(keys, np.uint64(low)))
        last = len(keys) if high == 2**64 else int(np.searchsorted(keys, np.uint64(high)))
        if last > first:
            tables.append(table.slice(first, last - first))
            sources.append(np.memmap(f"{job.segments}/{segment}.tokens", job.dtype, "r"))
    with ShardWriter(directory, name, np.dtype(job.dtype)) as writer:
        if tables:
            origin = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
            rows = pa.concat_tables(tables)
            order = np.argsort(rows["key"].to_numpy(), kind="stable")
            for begin in range(0, len(order), 1024):
                chosen = order[begin : begin + 1024]
                part = rows.take(pa.array(chosen))
                lengths, starts = part["tokens"].to_numpy(), part["start"].to_numpy()
                pieces = [sources[origin[i]][s : s + n] for i, s, n in zip(chosen, starts, lengths, strict=True)]
                columns = {column: part[column].to_pylist() for column in ("id", "url", "source", "bytes")}
                writer.add_many(np.concatenate(pieces), lengths, columns)
        info = writer.close()
    write_json(record, asdict(info))
    return info


def _finish(
    output_dir: Path,
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    folders: dict[str, str],
    shards: dict[tuple[str, str], list[ShardInfo]],
    empty: int,
) -> PackSummary:
    dtype = token_dtype(tokenizer.vocab_size).name
    splits = {}
    for source, folder in folders.items():
        tokenizer.save(output_dir / folder / "tokenizer")
        for split in SPLITS:
            infos, directory = tuple(shards[source, split]), output_dir / folder / split
            directory.mkdir(parents=True, exist_ok=True)
            manifest = Manifest(
                split, dtype, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.fingerprint, _settings_hash(config), infos
            )
            write_manifest(directory, manifest)
            splits[f"{folder}/{split}".lstrip("/")] = {
                "shards": len(infos), "documents": manifest.documents, "tokens": manifest.tokens, "bytes": manifest.text_bytes,
            }  # fmt: skip
    summary = PackSummary(True, splits, empty)
    write_json(output_dir / "summary.json", asdict(summary))
    _sweep(output_dir)
    return summary


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
    return "\n".join(lines)
