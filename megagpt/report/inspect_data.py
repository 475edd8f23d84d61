"""Inspect the tools' outputs: statistics, verification and lineage of shards, rejected documents, the ledger of a run.

Every function yields lines of text. It needs no torch, so it also runs on data nodes.
"""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from megagpt.config import Config, UserError, read_yaml
from megagpt.corpus.runner.summary import stage_outputs
from megagpt.data.dataset import TokenDataset
from megagpt.data.mixture import Mixture
from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.sample_hash import recompute_fed_hash
from megagpt.data.sample_ledger import Entry, read_ledger
from megagpt.data.shards import Manifest, ShardError, open_shard, read_manifest, verify_shard
from megagpt.data.state import MixtureStart, sample_indices
from megagpt.documents import Document, read_documents
from megagpt.files import read_json
from megagpt.output_list import LIST_FILE, problem_of, read_list
from megagpt.report.provenance import explain, show_record
from megagpt.report.show_rows import rows_problems, show_sample
from megagpt.settings_record import read_settings
from megagpt.tokenizer.open_tokenizer import open_tokenizer

log = logging.getLogger(__name__)

EXCERPT_CHARACTERS = 160
CHUNK_TOKENS = 4 << 20


class InspectConfig(Config):
    """Settings of `tools/inspect_data.py`. Give one of shards, stage, work_dir and run_dir."""

    shards: Path | None = None
    """A split (a folder with manifest.json), or a folder with splits below it. Without other settings: show statistics."""
    verify: bool = False
    """With shards: check every byte against the manifests and the list of outputs, and that end-of-text ends each document and
    is nowhere else. With stage: check every byte against the list of outputs."""
    token: int | None = Field(default=None, ge=0)
    """With shards: show the documents that the tokens from this one on come from."""
    num_tokens: int = Field(default=1, ge=1)
    """With token: how many tokens to show, from `token` on."""
    sample: int | None = Field(default=None, ge=0)
    """With shards of fine-tuning rows: show this sample, in the order of the shards, and which of its tokens are learned."""
    dumps: Path | None = None
    """With token: the web archives that the corpus was made from (a folder or a file), to show the records of the tokens."""
    split: Literal["train", "validation"] = "train"
    """The split in which `token` and `sample` count, if `shards` has both."""
    stage: Path | None = None
    """The output of an extraction, filter or deduplication stage: show counts, and examples of rejected documents by reason."""
    reason: str | None = None
    """With stage: show only reasons that begin with this."""
    num_examples: int = Field(default=3, ge=0)
    """With stage: examples per reason."""
    work_dir: Path | None = None
    """A corpus: show why the page `url` was kept or dropped."""
    url: str | None = None
    """With work_dir: a URL as in the dump, or a document's id."""
    run_dir: Path | None = None
    """A training run: recompute from the shards what it was fed, and compare it with the run's ledger."""
    step: int | None = Field(default=None, ge=0)
    """With run_dir: check only this step (from 0), and show the documents in its batch."""
    rank: int | None = Field(default=None, ge=0)
    """With step: show only the samples of this rank."""

    @model_validator(mode="after")
    def _check(self) -> "InspectConfig":
        given = [name for name in ("shards", "stage", "work_dir", "run_dir") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of shards, stage, work_dir and run_dir, not {' and '.join(given) or 'none'}")
        if (self.url is None) != (self.work_dir is None):
            raise ValueError("give url and work_dir together")
        if self.rank is not None and self.step is None:
            raise ValueError("rank needs step")
        return self


def inspect(config: InspectConfig) -> Iterator[str]:
    """The lines that the settings ask for. Raises UserError for wrong settings, and at the end of a check with problems."""
    if config.stage is not None and config.verify:
        return verify_stage(config.stage)
    if config.stage is not None:
        return show_rejected(config.stage, reason=config.reason, num_examples=config.num_examples)
    if config.run_dir is not None and config.step is None:
        return check_ledger(config.run_dir)
    if config.run_dir is not None and config.step is not None:
        return show_step(config.run_dir, config.step, rank=config.rank)
    if config.work_dir is not None and config.url is not None:
        return explain(config.work_dir, config.url)
    splits = find_splits(config.shards or Path())
    if config.token is not None or config.sample is not None:
        named = [path for path in splits if path.name == config.split] or splits
        if len(named) != 1:
            raise UserError(f"shards={config.shards}: has {len(named)} splits below it, and one is needed: name its folder")
        if config.sample is not None:
            return show_sample(named[0], config.sample)
        assert config.token is not None
        return show_tokens(named[0], config.token, config.num_tokens, config.dumps)
    if not config.verify:
        return show_statistics(splits)
    listed = list_of(config.shards or Path())
    if listed is None:
        log.warning(
            "shards=%s: an earlier release made them without a list of outputs, so a lost split cannot be found", config.shards
        )
    return verify_splits(splits, listed)


def find_splits(folder: Path) -> list[Path]:
    """The folders at or below `folder` that have a manifest.json. Raises UserError if there is none."""
    found = sorted(path.parent for path in folder.rglob("manifest.json"))
    if not found:
        raise UserError(f"shards={folder}: no manifest.json at or below it; tools/tokenize_documents.py writes one at its end")
    return found


# ---- shards


def show_statistics(splits: Sequence[Path]) -> Iterator[str]:
    """For each split: its sizes, documents by source, and documents by length."""
    import pyarrow.parquet as pq

    for directory in splits:
        manifest = read_manifest(directory)
        yield f"{directory}: {manifest.dtype}, vocabulary {manifest.vocab_size:,}, tokenizer {manifest.tokenizer_sha256[:12]}"
        yield (
            f"  {len(manifest.shards)} shards, {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
            f"{manifest.text_bytes:,} bytes of text, {manifest.text_bytes / max(manifest.tokens, 1):.3f} bytes per token"
        )
        documents, tokens, sizes = Counter[str](), Counter[str](), Counter[int]()
        for info in manifest.shards:
            table = pq.read_table(directory / f"{info.name}.docs.parquet", columns=["source", "tokens"])
            for row in table.group_by("source").aggregate([("tokens", "sum"), ("tokens", "count")]).to_pylist():
                documents[row["source"]] += row["tokens_count"]
                tokens[row["source"]] += row["tokens_sum"]
            # Lengths by power of two: their number is bounded for any number of documents.
            powers = np.frexp(table["tokens"].to_numpy())[1]
            sizes.update(dict(zip(*(part.tolist() for part in np.unique(powers, return_counts=True)), strict=True)))
        for source in sorted(documents):
            yield f"  source {source}: {documents[source]:,} documents, {tokens[source]:,} tokens"
        for power in sorted(sizes):
            yield f"  {2 ** max(power - 1, 0):>9,} to {2**power - 1:>9,} tokens: {sizes[power]:,} documents"


def list_of(folder: Path) -> Path | None:
    """The folder of the list of outputs that covers `folder` (itself or one of two parents); None if there is none."""
    return next((path for path in (folder, *folder.absolute().parents[:2]) if (path / LIST_FILE).is_file()), None)


def verify_stage(stage: Path) -> Iterator[str]:
    """Check every byte that a stage wrote. Raises UserError that names files that are missing or differ."""
    outputs = stage_outputs(stage, verify=True)
    yield f"{stage}: sound, {len(outputs)} files"


def verify_splits(splits: Sequence[Path], listed: Path | None = None) -> Iterator[str]:
    """Check every shard of every split, and the other files in the list of outputs of the folder `listed`.

    Yields a line per sound split, then raises ShardError that lists all problems.
    """
    faults: list[str] = []
    if listed is not None:
        entries = read_list(listed) or {}
        problems = (problem_of(listed / name, entry, verify="shard_" not in name) for name, entry in entries.items())
        faults += [problem for problem in problems if problem]
    total = sum(read_manifest(directory).tokens for directory in splits)
    with tqdm(total=total, unit="token", unit_scale=True, desc="verify", disable=None) as bar:
        for directory in splits:
            manifest, before = read_manifest(directory), len(faults)
            faults += check_tokenizer(directory, manifest)
            for number, info in enumerate(manifest.shards):
                found = list(verify_shard(directory, info, manifest.dtype))
                faults += found or check_contents(directory, manifest, number)
                bar.update(info.tokens)
            if len(faults) == before:
                yield f"{directory}: sound, {manifest.tokens:,} tokens in {len(manifest.shards)} shards"
    if faults:
        raise ShardError("\n  ".join([f"{len(faults)} problems found:", *faults]))


def check_tokenizer(directory: Path, manifest: Manifest) -> Iterator[str]:
    """One message if the tokenizer beside a split is missing, or is not the one that made its shards."""
    try:
        tokenizer = open_tokenizer(directory.parent / "tokenizer", saved=True)
    except UserError as error:
        yield str(error)
        return
    if tokenizer.fingerprint != manifest.tokenizer_sha256:
        yield f"{directory.parent / 'tokenizer'}: sha256 {tokenizer.fingerprint} is not the shards' {manifest.tokenizer_sha256}"


def check_contents(directory: Path, manifest: Manifest, number: int) -> Iterator[str]:
    """Messages about a shard whose bytes are sound but whose contents break the rules of a shard."""
    import pyarrow.parquet as pq

    if manifest.supervised is not None:
        yield from rows_problems(directory, manifest, number)
        return
    info = manifest.shards[number]
    shard, path = open_shard(directory, info, manifest.dtype), directory / f"{info.name}.bin"
    ends, largest = 0, -1
    for start in range(0, info.tokens, CHUNK_TOKENS):
        tokens = shard.read(start, min(CHUNK_TOKENS, info.tokens - start))
        ends += int(np.count_nonzero(tokens == manifest.eot_id))
        largest = max(largest, int(tokens.max()))
    offsets = shard.document_offsets()
    if largest >= manifest.vocab_size:
        yield f"{path}: has id {largest}, but the vocabulary has {manifest.vocab_size} ids"
    last = np.array([int(shard.read(int(end) - 1, 1)[0]) for end in offsets[1:]])
    if ends != info.documents or np.any(last != manifest.eot_id):
        yield f"{path}: {ends} end-of-text tokens, {info.documents} documents: each document ends with one and holds no other"
    rows = pq.read_table(directory / f"{info.name}.docs.parquet", columns=["tokens", "bytes"])
    if not np.array_equal(rows["tokens"].to_numpy(), np.diff(offsets)) or sum(rows["bytes"].to_pylist()) != info.text_bytes:
        yield f"{directory / info.name}.docs.parquet: its tokens or bytes are not those of the index and the manifest"


def show_tokens(directory: Path, token: int, num_tokens: int, dumps: Path | None = None) -> Iterator[str]:
    """The documents of tokens [token, token + num_tokens) of a split; with `dumps` also their records in the dump."""
    dataset, tokenizer = TokenDataset(directory, seq_len=1), open_tokenizer(directory.parent / "tokenizer", saved=True)
    if token + num_tokens > dataset.num_tokens:
        raise UserError(f"{directory}: token={token} num_tokens={num_tokens}: the split has {dataset.num_tokens} tokens")
    for place in places(dataset, token, num_tokens):
        yield f"{place.where}: {place.describe()}"
        yield f"  {excerpt(tokenizer.decode(dataset.tokens(place.start, place.count).tolist()))}"
        if dumps is not None:
            yield from (f"  {line}" for line in show_record(dumps, place.row["id"]))


@dataclass(frozen=True, slots=True)
class Place:
    """Consecutive tokens of one document. `start` counts tokens of the split, `offset` tokens of the document."""

    start: int
    count: int
    offset: int
    where: str
    row: dict[str, Any]

    def describe(self) -> str:
        """Which tokens of which document, in words."""
        row = self.row
        url = f" {row['url']}" if row["url"] else ""
        return (
            f"tokens {self.offset:,} to {self.offset + self.count:,} of {row['tokens']:,} of {row['id']} ({row['source']}){url}"
        )


def places(dataset: TokenDataset, token: int, num_tokens: int) -> Iterator[Place]:
    """The documents of a range of a split's tokens, in order."""
    import pyarrow.parquet as pq

    tables: dict[Path, Any] = {}
    end = token + num_tokens
    while token < end:
        path, number, start = dataset.document(token)
        if path not in tables:
            tables = {path: pq.read_table(path)}
        row = tables[path].slice(number, 1).to_pylist()[0]
        count = min(end, start + row["tokens"]) - token
        yield Place(token, count, token - start, f"{path.name} row {number}", row)
        token += count


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    shown = json.dumps(text[:EXCERPT_CHARACTERS], ensure_ascii=False)
    return shown + (" …" if len(text) > EXCERPT_CHARACTERS else "")


# ---- stages


def show_rejected(stage: Path, *, reason: str | None, num_examples: int) -> Iterator[str]:
    """How many documents a stage kept and dropped, and the beginnings of a few dropped ones by reason.

    Raises UserError if the folder is not the output of a stage that rejects documents.
    """
    if not (stage / "summary.json").is_file():
        raise UserError(f"stage={stage}: has no summary.json: it is not the output of a stage, or the stage has not finished")
    summary = read_json(stage / "summary.json")
    if "rejected" not in summary:
        raise UserError(f"stage={stage}: this stage rejects no documents (extract, filter and dedup do)")
    rejected = sum(summary["rejected"].values())
    yield f"{stage}: {summary['documents_in']:,} documents in, {summary['kept']:,} kept, {rejected:,} rejected"
    examples: dict[str, list[Document]] = {}
    for path in sorted((stage / "rejected").glob("*.jsonl.zst")):
        for document in read_documents(path):
            examples.setdefault(str(document.meta.get("rejected")), []).append(document)
    for name, count in sorted(summary["rejected"].items(), key=lambda item: (-item[1], item[0])):
        if reason is None or name.startswith(reason):
            yield f"{name}: {count:,}"
            for document in examples.get(name, [])[:num_examples]:
                yield f"  {document.id} {document.url or ''}".rstrip()
                yield f"    {excerpt(document.text)}"


# ---- runs


def check_ledger(run_dir: Path) -> Iterator[str]:
    """Recompute every step's hash from the shards, and check that no step is missing. Raises UserError listing differences."""
    entries, data_at = _open_run(run_dir)
    faults = [
        f"step {entry.step} follows step {before.step}: steps are missing"
        for before, entry in itertools.pairwise(entries)
        if entry.step != before.step + 1
    ]
    for entry in tqdm(entries, unit="step", desc="ledger", disable=None):
        found = recompute_fed_hash(data_at(entry), entry.state, entry.num_samples)
        if found != entry.fed_hash:
            faults.append(f"step {entry.step}: fed_hash {entry.fed_hash}, the shards give {found}")
    if faults:
        raise UserError("\n  ".join([f"{run_dir}: the ledger does not agree with the shards:", *faults]))
    first, end = min(entry.first_sample for entry in entries), _end(entries)
    yield f"{run_dir}: steps {entries[0].step} to {entries[-1].step}, samples {first:,} to {end:,}, all as in the shards"
    used = sorted(samples for entry in entries for samples in entry.ranges())
    for (_, end), (start, _) in itertools.pairwise(used):
        if start != end:
            yield f"  samples {min(start, end):,} to {max(start, end):,} were {'left out' if start > end else 'used twice'}"


def show_step(run_dir: Path, step: int, *, rank: int | None) -> Iterator[str]:
    """The documents in the batch of a step, and whether its hash equals that of the shards; UserError at the end if not."""
    entries, data_at = _open_run(run_dir)
    entry = next((entry for entry in entries if entry.step == step), None)
    if entry is None:
        raise UserError(f"{run_dir}: step={step}: the ledger has steps {entries[0].step} to {entries[-1].step}")
    train = data_at(entry)
    found = recompute_fed_hash(train, entry.state, entry.num_samples)
    verdict = "as in the shards" if found == entry.fed_hash else f"BUT the shards give {found}"
    yield f"step {step}: samples {entry.first_sample:,} to {_end([entry]):,}, fed_hash {entry.fed_hash}, {verdict}"
    for index in _samples_of(run_dir, entry, rank):
        source, position = train.locate(index)
        dataset = train.datasets[source]
        if isinstance(dataset, TokenDataset):
            start = dataset.first_token(position)
            yield f"sample {index}: tokens {start:,} to {start + dataset.seq_len:,} of {dataset.directory}"
            for place in places(dataset, start, dataset.seq_len):
                yield f"  {place.describe()}"
    if found != entry.fed_hash:
        raise UserError(f"{run_dir}: step {step} was fed other tokens than the shards hold now")


def _open_run(run_dir: Path) -> tuple[list[Entry], Callable[[Entry], Mixture]]:
    """The ledger, and a function from an entry to the mixture of its attempt (settings may differ between attempts)."""
    settings = read_yaml(run_dir / "config.yaml")
    if "data" not in settings:
        raise UserError(f"{run_dir / 'config.yaml'}: has no section `data`: it is not a training run")
    entries = read_ledger(run_dir)
    if not entries:
        raise UserError(f"{run_dir}: has no ledger, or an empty one: the run has done no step")
    opened: dict[str, Mixture] = {}

    def data_at(entry: Entry) -> Mixture:
        path = run_dir / "starts" / f"{entry.attempt:04d}.json"
        start = read_json(path) if path.is_file() else {"config": settings}
        section = start["config"].get("data", settings["data"])
        today = settings["data"]["sources"]  # corpora may have been moved since
        section = {**section, "sources": {name: {**item, "path": today.get(name, item)["path"]}
                                          for name, item in section["sources"].items()}}  # fmt: skip
        key = json.dumps([section, start.get("mixture")], default=str)
        if key not in opened:
            mixture = MixtureStart.from_json(start["mixture"]) if start.get("mixture") else None
            config = read_settings(DataConfig, section, source=str(path))
            opened[key] = open_data(config).train.continued(mixture)
        return opened[key]

    return entries, data_at


def _samples_of(run_dir: Path, entry: Entry, rank: int | None) -> list[int]:
    """The global sample indices of a step, or those of one rank in the layout of the attempt that did the step."""
    indices = sample_indices(entry.state, entry.num_samples)
    if rank is None:
        return indices
    start = read_json(run_dir / "starts" / f"{entry.attempt:04d}.json")
    size, width = start["world_size"], start["config"]["micro_batch_size"]
    if rank >= size:
        raise UserError(f"rank={rank}: step {entry.step} had ranks 0 to {size - 1}")
    shared = start["config"].get("engine", {}).get("context_parallel_size", 1)  # ranks that had parts of the same samples
    return [index for i, index in enumerate(indices) if i // width % (size // shared) == rank // shared]


def _end(entries: Sequence[Entry]) -> int:
    return max(end for entry in entries for _, end in entry.ranges())
