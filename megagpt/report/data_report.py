"""The report of a corpus: one self-contained HTML page made from the outputs of its stages in work_dir. No torch."""

import functools
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import orjson
import zstandard
from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.documents import Document, open_lines, read_documents
from megagpt.files import read_json, write_text
from megagpt.report.funnel import STAGES, big, read_funnel, read_overlapping, show_funnel
from megagpt.report.offending import cut, mark
from megagpt.report.page import Bars, Block, Card, Fold, Heading, Note, Pair, Quote, Table, Threshold, Tile, page
from megagpt.report.thresholds import Breach, Measure, measure, read_settings

log = logging.getLogger(__name__)
T = TypeVar("T")

DAMAGE = (UserError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error, zstandard.ZstdError)
"""What reading a damaged file can raise; pyarrow's errors are ValueErrors and OSErrors."""

SHOWN_CHARACTERS = 1000
"""Most characters that are shown of a text."""
MAX_SHOWN_CHARACTERS = 3_000_000
"""Most characters of all texts on the page; further reasons have no examples."""
MAX_NAMES = 1_000_000
"""Most domains, or documents with copies, that are counted at the same time; beyond it the rarest are dropped."""


class DataReportConfig(Config):
    """Which corpus to report on."""

    work_dir: Path
    """The corpus: the folder with extract/, filter/, dedup/ and shards/. Stages that have not run yet are left out."""
    output: Path | None = None
    """The page; null = work_dir/report.html."""
    num_examples: int = Field(default=3, ge=0, le=20)
    """Rejected documents to show per reason."""
    num_documents: int = Field(default=20_000, ge=0)
    """Kept documents to read for the counts of languages, evenly from all files."""
    num_rows: int = Field(default=25, ge=1)
    """Most rows of a table (domains, most copied documents, reasons)."""
    num_measured: int = Field(default=500, ge=0, le=20_000)
    """Documents, evenly from all files, on which the filters' statistics are measured for the thresholds on the page."""


@dataclass(frozen=True)
class Shards:
    """Totals over the tables of all documents in shards."""

    splits: list[dict[str, Any]]
    """name, shards, documents, tokens, bytes."""
    sources: Counter[str]
    """Tokens by source."""
    domains: Counter[str]
    """Tokens by host name."""
    lengths: Counter[int]
    """Documents by length: key n counts those with 2^(n-1) to 2^n - 1 tokens."""


@dataclass(frozen=True)
class FilterSample:
    """Documents on which the page shows the thresholds of the filter stage."""

    measure: Measure | None
    """None: no filter stage, or its settings were not kept."""
    measured: list[tuple[dict[str, float], float]]
    """Values by rule of a document, and how many documents of the corpus it stands for."""
    kept: list[tuple[Document, dict[str, float]]]
    """Kept documents and their values."""
    is_input: bool
    """Whether `measured` is of the stage's input; otherwise of kept documents and of the samples of dropped ones."""


@dataclass(frozen=True)
class Duplicates:
    """What deduplication dropped."""

    kinds: Counter[str]
    similarities: Counter[int]
    """Near duplicates by similarity in hundredths, rounded down to fives."""
    most_copied: list[tuple[str, int]]
    """(id of the kept document, number of documents dropped as its copies)."""


def report_data(config: DataReportConfig) -> Path:
    """Write the page and return its path. Raises UserError if no stage has run in work_dir, or a stage's summary is damaged.

    Other damaged files are left out; a line on the page and in the log names each.
    """
    funnel = read_funnel(config.work_dir)
    if not funnel:
        raise UserError(f"work_dir={config.work_dir}: no stage has run here ({', '.join(STAGES)} leave a summary.json)")
    path = config.output or config.work_dir / "report.html"
    write_text(path, render(config, funnel))
    return path


def render(config: DataReportConfig, funnel: list[dict[str, Any]]) -> str:
    """The page as HTML."""
    work_dir, name = config.work_dir, config.work_dir.resolve().name
    problems: list[str] = []
    shards = _tried(problems, "shards", lambda: read_shards(work_dir), Shards([], Counter(), Counter(), Counter()))
    nothing = Duplicates(Counter(), Counter(), [])
    duplicates = _tried(problems, "dedup/duplicates", lambda: read_duplicates(work_dir, config.num_rows), nothing)
    languages, num_read = _tried(
        problems, "kept documents", lambda: count_languages(work_dir, config.num_documents), (Counter[str](), 0)
    )
    empty = FilterSample(None, [], [], is_input=False)
    sample = _tried(problems, "filter", lambda: read_sample(work_dir, config.num_measured), empty)
    sources = _shares(shards.sources, config.num_rows, "tokens") if len(shards.sources) > 1 else []
    tiles = _tried(problems, "shards", lambda: list(_tiles(funnel, shards, duplicates, work_dir)), [])
    cards = [
        Card("From records to shards", show_funnel("", funnel, max_rows=config.num_rows)),
        Card("Shards", _splits(shards)),
        Card("Tokens by source", sources),
        Card("Length of documents", _lengths(shards.lengths)),
        Card("Languages", _languages(languages, num_read)),
        Card("Domains with most tokens", _shares(shards.domains, config.num_rows, "tokens")),
        Card("Duplicates", _duplicates(duplicates)),
        Card("What another threshold would drop", _thresholds(sample)),
        Card("Dropped and kept, by reason", _examples(work_dir, funnel, config.num_examples, sample, problems)),
    ]
    for problem in problems:
        log.warning("%s", problem)
    return page(f"{name} – MegaGPT data", cards, heading=name, tiles=tiles, problems=problems)


def _tried(problems: list[str], what: str, read: Callable[[], T], instead: T) -> T:
    """The result of `read`; if a file is damaged, `instead`, and a line in `problems`."""
    try:
        return read()
    except DAMAGE as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"{message} is missing" if isinstance(error, KeyError) else message
        problems.append(f"{what}: damaged, left out: {reason}")
        return instead


# ---- reading


def read_shards(work_dir: Path) -> Shards:
    """Add up the tables of documents beside the shards, with one row group in memory at a time."""
    import pyarrow.parquet as pq

    shards = Shards([], Counter(), Counter(), Counter())
    for manifest_path in sorted((work_dir / "shards").rglob("manifest.json")):
        infos = read_json(manifest_path)["shards"]
        totals = {name: sum(info[name] for info in infos) for name in ("documents", "tokens", "text_bytes")}
        split = str(manifest_path.parent.relative_to(work_dir / "shards"))
        shards.splits.append({"name": split, "shards": len(infos), **totals})
        for info in infos:
            file = pq.ParquetFile(manifest_path.parent / f"{info['name']}.docs.parquet")
            for batch in file.iter_batches(columns=["url", "source", "tokens"]):
                columns = batch.to_pydict()
                for url, source, tokens in zip(columns["url"], columns["source"], columns["tokens"], strict=True):
                    shards.sources[source] += tokens
                    if url:
                        shards.domains[domain_of(url)] += tokens
                powers = np.frexp(batch["tokens"].to_numpy())[1]
                shards.lengths.update(powers.tolist())
                _forget_rare(shards.domains)
    return shards


def domain_of(url: str) -> str:
    """The host name in a URL, without www; the text before the first slash if it has no scheme."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        host = ""
    return host.removeprefix("www.") or "(none)"


def read_duplicates(work_dir: Path, num_rows: int) -> Duplicates:
    """Count the duplicates that dedup/duplicates lists."""
    kinds, similarities, copies = Counter[str](), Counter[int](), Counter[str]()
    for path in sorted((work_dir / "dedup" / "duplicates").glob("*.jsonl.zst")):
        with open_lines(path) as lines:
            for value in map(orjson.loads, lines):
                kinds[value["kind"]] += 1
                copies[value["kept"]] += 1
                if value["kind"] == "near":
                    similarities[min(95, int(100 * value["similarity"] + 1e-9) // 5 * 5)] += 1
        _forget_rare(copies)
    most = sorted(copies.items(), key=lambda item: (-item[1], item[0]))[:num_rows]
    return Duplicates(kinds, similarities, most)


def read_sample(work_dir: Path, num_measured: int) -> FilterSample:
    """Measure documents of the filter stage: its input if that still exists, otherwise its kept and dropped documents."""
    stage = work_dir / "filter"
    settings = read_settings(stage)
    if settings is None or not num_measured:
        return FilterSample(None, [], [], is_input=False)
    measure_all, kept_files = Measure(settings), sorted(stage.glob("*.jsonl.zst"))
    kept = [(document, measure_all.values(document)) for document in _first_of_each(kept_files, num_measured)]
    inputs = sorted((work_dir / "extract").glob("*.jsonl.zst")) if (work_dir / "extract" / "summary.json").is_file() else []
    measure_ = Measure(settings, decides=True)
    if inputs:
        measured = [(measure_all.values(document), 1.0) for document in _first_of_each(inputs, num_measured)]
        return FilterSample(measure_, measured, kept, is_input=True)
    summary = read_json(stage / "summary.json")
    measured = [(values, summary["kept"] / len(kept)) for _, values in kept]
    for reason, documents in read_examples(stage, summary["rejected"], 20).items():
        weight = summary["rejected"].get(reason, 0) / len(documents)
        measured += [(measure_all.values(document), weight) for document in documents]
    return FilterSample(measure_, measured, kept, is_input=False)


def _first_of_each(files: Sequence[Path], number: int) -> list[Document]:
    share = -(-number // max(1, len(files)))
    return [document for path in files for document in itertools.islice(read_documents(path), share)][:number]


def _forget_rare(counts: Counter[str]) -> None:
    if len(counts) > MAX_NAMES:
        kept = counts.most_common(MAX_NAMES // 2)
        counts.clear()
        counts.update(dict(kept))


def count_languages(work_dir: Path, num_documents: int) -> tuple[Counter[str], int]:
    """(documents by meta.language, number read) of the first documents in each file of the last stage that has run."""
    stages = [work_dir / stage for stage in reversed(STAGES) if (work_dir / stage / "summary.json").is_file()]
    files = sorted(stages[0].glob("*.jsonl.zst")) if stages else []
    languages = Counter[str]()
    for path in files:
        share = -(-num_documents // len(files))
        languages.update(str(document.meta.get("language") or "") for document in itertools.islice(read_documents(path), share))
    return languages, sum(languages.values())


def read_examples(stage: Path, reasons: Mapping[str, int], num_examples: int) -> dict[str, list[Document]]:
    """By reason, the first documents in a stage's sample of rejected ones, at most num_examples each."""
    found: dict[str, list[Document]] = {}
    for path in sorted((stage / "rejected").glob("*.jsonl.zst")):
        if all(len(found.get(reason, [])) >= num_examples for reason in reasons):
            break
        for document in read_documents(path):
            examples = found.setdefault(str(document.meta.get("rejected")), [])
            if len(examples) < num_examples:
                examples.append(document)
    return found


# ---- sections


def _tiles(funnel: Sequence[dict[str, Any]], shards: Shards, duplicates: Duplicates, work_dir: Path) -> Iterator[Tile]:
    first = funnel[0]
    if "documents_in" in first:
        yield Tile("documents in", big(first["documents_in"]), f"before {first['stage']}")
    documents = [stage for stage in funnel if stage["stage"] in STAGES]
    if documents:
        share = documents[-1]["kept"] / max(1, first.get("documents_in", first["kept"]))
        yield Tile("kept", big(documents[-1]["kept"]), f"{share:.1%}, after {documents[-1]['stage']}")
    if duplicates.kinds:
        yield Tile(
            "copies", big(sum(duplicates.kinds.values())), ", ".join(f"{n:,} {k}" for k, n in sorted(duplicates.kinds.items()))
        )
    tokens, size = (sum(split[name] for split in shards.splits) for name in ("tokens", "text_bytes"))
    if tokens:
        yield Tile("tokens", big(tokens), f"{size / tokens:.2f} bytes per token")
        yield Tile("text", f"{big(size)}B", "UTF-8, in shards")
        yield Tile("train/validation overlap", f"{read_overlapping(work_dir):,}", "dropped from train: near validation")
    faults = sum(sum(stage["faults"].values()) for stage in funnel)
    yield Tile("malformed records", f"{faults:,}", "in the input")


def _splits(shards: Shards) -> list[Block]:
    rows = [
        (s["name"], s["shards"], f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['tokens'] / max(1, s['documents']):,.0f}")
        for s in shards.splits
    ]
    head = ("split", "shards", "documents", "tokens", "tokens per document")
    return [Table(head, rows, numbers=(1, 2, 3, 4))] if rows else []


def _shares(counts: Counter[str], num_rows: int, unit: str) -> list[Block]:
    total, most = sum(counts.values()), counts.most_common(num_rows)
    if not most:
        return []
    rows = [(name, count / most[0][1], f"{big(count)} {unit} · {count / total:.1%}", 1) for name, count in most]
    rest = len(counts) - len(most)
    return [Bars(rows), *([Note(f"and {rest:,} more")] if rest > 0 else [])]


def _lengths(lengths: Counter[int]) -> list[Block]:
    if not lengths:
        return []
    highest, total = max(lengths.values()), sum(lengths.values())
    rows = [
        (
            f"{2 ** (power - 1):,} to {2**power - 1:,} tokens",
            lengths[power] / highest,
            f"{lengths[power]:,} · {lengths[power] / total:.1%}",
            3,
        )
        for power in range(min(lengths), max(lengths) + 1)
    ]
    return [Bars(rows)]


def _languages(languages: Counter[str], num_read: int) -> list[Block]:
    if not set(languages) - {""}:
        return []
    rows = [
        (name or "unknown", count / num_read, f"{count:,} · {count / num_read:.1%}", 5)
        for name, count in languages.most_common(25)
    ]
    return [Bars(rows), Note(f"of {num_read:,} kept documents, the first ones of each file")]


def _duplicates(duplicates: Duplicates) -> list[Block]:
    blocks: list[Block] = []
    if duplicates.similarities:
        highest = max(duplicates.similarities.values())
        rows = [
            (f".{low} to .{low + 5}" if low < 95 else ".95 to 1", count / highest, f"{count:,} near duplicates", 2)
            for low, count in sorted(duplicates.similarities.items())
        ]
        blocks += [Heading("similarity to the kept document"), Bars(rows)]
    if duplicates.most_copied:
        rows = [(name, f"{count:,}") for name, count in duplicates.most_copied]
        head = ("kept document", "copies dropped")
        blocks += [Heading("documents with most copies"), Table(head, rows, numbers=(1,))]
    return blocks


def _thresholds(sample: FilterSample) -> list[Block]:
    if sample.measure is None or not sample.measured:
        return []
    found = measure(sample.measured, sample.measure.limits)
    of = "documents of the filters' input" if sample.is_input else "documents, kept ones and samples of dropped ones"
    note = (
        f"Measured on {len(sample.measured):,} {of}, each rule as if it were the only one; heights are square roots of shares."
    )
    if not sample.is_input:
        note += " Only the first 4,000 characters of dropped documents exist, as the earlier filters had changed them."
    drawings = []
    for s in found:
        passed = len(sample.measured) - s.num_documents
        words = f"the rule does not apply to {passed:,} of them" if passed else ""
        drawings.append(Threshold(s.rule, s.limit, s.is_maximum, s.steps, s.dropped, words))
    folds: list[Block] = []
    for name, group in itertools.groupby(drawings, key=lambda drawing: drawing.name.partition(".")[0]):
        of_filter = list(group)
        folds.append(Fold(f"{name} · {len(of_filter)} threshold{'s' * (len(of_filter) > 1)}", of_filter))
    return [Note(note), *folds] if folds else []


def _examples(
    work_dir: Path, funnel: Sequence[dict[str, Any]], num_examples: int, sample: FilterSample, problems: list[str]
) -> list[Block]:
    blocks: list[Block] = []
    left = MAX_SHOWN_CHARACTERS
    for stage in funnel:
        name = stage["stage"]
        if name not in STAGES or not num_examples:
            continue
        read = functools.partial(read_examples, work_dir / name, stage["rejected"], num_examples)
        found = _tried(problems, f"{name}/rejected", read, {})
        for reason, count in sorted(stage["rejected"].items(), key=lambda item: (-item[1], item[0])):
            documents = found.get(reason, [])
            left -= 2 * SHOWN_CHARACTERS * len(documents)
            if not documents or left < 0:
                continue
            breaches = [sample.measure.breach(d, reason) if sample.measure and name == "filter" else None for d in documents]
            texts = [_quote(document, reason, breach) for document, breach in zip(documents, breaches, strict=True)]
            breach = next(filter(None, breaches), None)
            near = _nearest(sample, breach, len(documents)) if name == "filter" else []
            heads = ("dropped", f"kept, closest to {breach.rule} = {breach.limit:.6g}" if breach else "kept")
            pair: Block = Pair(heads, texts, near)
            blocks.append(Fold(f"{name} · {reason} · {count:,}", [pair] if near else texts))
    if left < 0:
        blocks.append(Note("Further reasons are left out: the page would grow too large."))
    return blocks


def _nearest(sample: FilterSample, breach: Breach | None, number: int) -> list[Block]:
    """Kept texts; those that the rule almost dropped come first."""
    if breach is None:
        return [_quote(document) for document, _ in sample.kept[:number]]
    measured = [
        (abs(values[breach.rule] - breach.limit), i) for i, (_, values) in enumerate(sample.kept) if breach.rule in values
    ]
    chosen = [sample.kept[i] for _, i in sorted(measured)[:number]]
    return [_quote(document, note=f"{breach.rule}: {values[breach.rule]:.4g}") for document, values in chosen]


def _quote(document: Document, reason: str = "", breach: Breach | None = None, note: str = "") -> Quote:
    """A text for the page; in a dropped text the parts that the reason is about are marked."""
    if breach is not None:
        note = f"{breach.rule} = {breach.limit:.6g}, here {breach.value:.4g}"
    where = " · ".join(filter(None, (note, document.id, document.url)))
    parts = cut(mark(document.text.strip("\n"), reason), SHOWN_CHARACTERS)
    return Quote(parts or [("(no text)", False)], where=where)
