"""The report of a corpus: one self-contained HTML page made from what its stages left in work_dir. No torch."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.documents import Document, open_lines, read_documents
from megagpt.files import read_json, write_text
from megagpt.report.funnel import STAGES, big, read_funnel, read_overlapping, show_funnel
from megagpt.report.page import Bars, Block, Card, Fold, Heading, Note, Quote, Table, Tile, page

MAX_NAMES = 1_000_000
"""Domains, and documents with copies, that are counted at once; beyond that those seen once are forgotten."""


class DataReportConfig(Config):
    """Which corpus is reported on."""

    work_dir: Path
    """The corpus: the folder with extract/, filter/, dedup/ and shards/; what has not run yet is left out."""
    output: Path | None = None
    """The page; null = work_dir/report.html."""
    num_examples: int = Field(default=3, ge=0, le=20)
    """Rejected documents that are shown per reason."""
    num_documents: int = Field(default=20_000, ge=0)
    """So many kept documents, evenly from all files, are read to count languages."""
    num_rows: int = Field(default=25, ge=1)
    """Rows of a table (domains, most copied documents, reasons) at most."""


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
    """Documents by power of two of their tokens: n counts those of 2^(n-1) to 2^n - 1."""


@dataclass(frozen=True)
class Duplicates:
    """What deduplication dropped."""

    kinds: Counter[str]
    similarities: Counter[int]
    """Near duplicates by similarity in hundredths, rounded down to fives."""
    most_copied: list[tuple[str, int]]
    """(id of the document that stays, how many were dropped for it)."""


def report_data(config: DataReportConfig) -> Path:
    """Write the page and return its path. Raises UserError if no stage has run in work_dir."""
    funnel = read_funnel(config.work_dir)
    if not funnel:
        raise UserError(f"work_dir={config.work_dir}: no stage has run here ({', '.join(STAGES)} leave a summary.json)")
    path = config.output or config.work_dir / "report.html"
    write_text(path, render(config, funnel))
    return path


def render(config: DataReportConfig, funnel: list[dict[str, Any]]) -> str:
    """The page as HTML."""
    work_dir, name = config.work_dir, config.work_dir.resolve().name
    shards, duplicates = read_shards(work_dir), read_duplicates(work_dir, config.num_rows)
    languages, num_read = count_languages(work_dir, config.num_documents)
    sources = _shares(shards.sources, config.num_rows, "tokens") if len(shards.sources) > 1 else []
    cards = [
        Card("From records to shards", show_funnel("", funnel, max_rows=config.num_rows)),
        Card("Shards", _splits(shards)),
        Card("Tokens by source", sources),
        Card("Length of documents", _lengths(shards.lengths)),
        Card("Languages", _languages(languages, num_read)),
        Card("Domains with most tokens", _shares(shards.domains, config.num_rows, "tokens")),
        Card("Duplicates", _duplicates(duplicates)),
        Card("What was dropped, by reason", _examples(work_dir, funnel, config.num_examples)),
    ]
    tiles = list(_tiles(funnel, shards, duplicates, work_dir))
    return page(f"{name} – MegaGPT data", cards, heading=name, tiles=tiles)


# ---- reading


def read_shards(work_dir: Path) -> Shards:
    """Add up the tables of documents beside the shards, one row group in memory at a time."""
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
    """Count what dedup/duplicates lists."""
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


def _forget_rare(counts: Counter[str]) -> None:
    if len(counts) > MAX_NAMES:
        kept = counts.most_common(MAX_NAMES // 2)
        counts.clear()
        counts.update(dict(kept))


def count_languages(work_dir: Path, num_documents: int) -> tuple[Counter[str], int]:
    """(documents by meta.language, how many were read) among the first documents of each file of the last stage that ran."""
    stages = [work_dir / stage for stage in reversed(STAGES) if (work_dir / stage / "summary.json").is_file()]
    files = sorted(stages[0].glob("*.jsonl.zst")) if stages else []
    languages = Counter[str]()
    for path in files:
        share = -(-num_documents // len(files))
        languages.update(str(document.meta.get("language") or "") for document in itertools.islice(read_documents(path), share))
    return languages, sum(languages.values())


def read_examples(stage: Path, reasons: Mapping[str, int], num_examples: int) -> dict[str, list[Document]]:
    """The first rejected documents per reason that a stage put aside."""
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
        yield Tile("train/validation overlap", f"{read_overlapping(work_dir):,}", "left out of train: too like validation")
    faults = sum(sum(stage["faults"].values()) for stage in funnel)
    yield Tile("damaged records", f"{faults:,}", "met in the input")


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
        (name or "not noted", count / num_read, f"{count:,} · {count / num_read:.1%}", 5)
        for name, count in languages.most_common(25)
    ]
    return [Bars(rows), Note(f"of {num_read:,} documents that were kept, the first ones of each file")]


def _duplicates(duplicates: Duplicates) -> list[Block]:
    blocks: list[Block] = []
    if duplicates.similarities:
        highest = max(duplicates.similarities.values())
        rows = [
            (f".{low} to .{low + 5}" if low < 95 else ".95 to 1", count / highest, f"{count:,} near duplicates", 2)
            for low, count in sorted(duplicates.similarities.items())
        ]
        blocks += [Heading("similarity to the document that stays"), Bars(rows)]
    if duplicates.most_copied:
        rows = [(name, f"{count:,}") for name, count in duplicates.most_copied]
        head = ("document that stays", "dropped for it")
        blocks += [Heading("documents with most copies"), Table(head, rows, numbers=(1,))]
    return blocks


def _examples(work_dir: Path, funnel: Sequence[dict[str, Any]], num_examples: int) -> list[Block]:
    blocks: list[Block] = []
    for stage in funnel:
        if stage["stage"] not in STAGES or not num_examples:
            continue
        found = read_examples(work_dir / stage["stage"], stage["rejected"], num_examples)
        for reason, count in sorted(stage["rejected"].items(), key=lambda item: (-item[1], item[0])):
            texts = [_quote(document) for document in found.get(reason, [])]
            if texts:
                blocks.append(Fold(f"{stage['stage']} · {reason} · {count:,}", texts))
    return blocks


def _quote(document: Document) -> Quote:
    where = " · ".join(filter(None, (document.id, document.url)))
    text = "\n".join(line for part in document.text.split("\n") if (line := part.strip()))
    shown = text[:600] + (" …" if len(text) > 600 else "")
    return Quote([(shown or "(no text)", False)], where=where)
