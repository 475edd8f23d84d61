"""Trace a document: its record in the dump, and what every stage recorded about it. No torch."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megagpt.config import UserError
from megagpt.corpus.runner.blocks import Block
from megagpt.documents import open_lines, parse_document
from megagpt.files import read_json
from megagpt.report.funnel import STAGES

HEAD_BYTES = 8192


def explain(work_dir: Path, name: str) -> Iterator[str]:
    """A line per stage and document with this URL or id, in the order of the stages: why it was dropped, or where it is.

    Raises UserError if no document in work_dir has this URL or id.
    """
    stages = [stage for stage in STAGES if (work_dir / stage / "summary.json").is_file()]
    if not stages:
        raise UserError(f"work_dir={work_dir}: no stage has run here ({', '.join(STAGES)} leave a summary.json)")
    found = 0
    for stage in stages:
        for line in _dropped(work_dir / stage, name):
            found += 1
            yield f"{stage}: {line}"
    manifests = sorted((work_dir / "shards").rglob("manifest.json"))
    where = _in_shards(work_dir / "shards", manifests, name) if manifests else _kept(work_dir / stages[-1], name)
    for line in where:
        found += 1
        yield line
    if not found:
        raise UserError(
            f"url={name}: no document in {work_dir} has this URL or id: its record is not in the inputs, or it is not a page "
            "(extract/summary.json counts the records by type)"
        )


def show_record(dumps: Path, document_id: str) -> Iterator[str]:
    """The record of a web archive that a document was made from: its headers, and those of HTTP.

    dumps: the archive, or a folder that has it at any depth. Raises UserError if the archive or the record is missing.
    """
    from megagpt.corpus.readers.warc import Record, read_records

    name, _, offset = document_id.rpartition(":")
    if not name or not re.fullmatch(r"\d+(\+\d+)?", offset):
        raise UserError(f"dumps={dumps}: {document_id} is not the id of a record: <file>:<offset> is expected")
    paths = sorted(dumps.rglob(glob.escape(name))) if dumps.is_dir() else [dumps] * (dumps.name == name)
    if not paths:
        raise UserError(f"dumps={dumps}: {name}, the source of {document_id}, is missing")
    start = int(offset.partition("+")[0])
    for record in read_records(Block(str(paths[0]), name, 0, start, start + 1)):
        if isinstance(record, Record) and record.where == document_id:
            yield f"{paths[0]}, byte {offset}: {record.type}, {record.date}, {record.mime}, {len(record.body):,} bytes"
            yield from (f"  {header}: {value}" for header, value in record.headers.items())
            head = record.body[:HEAD_BYTES].replace(b"\r\n", b"\n").partition(b"\n\n")[0] if record.is_http else b""
            yield from (f"  | {line}" for line in head.decode("utf-8", "replace").splitlines())
            return
    raise UserError(f"{paths[0]}: has no record at {offset}: it is not the file that {document_id} was made from")


def _lines_with(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file that contain `name`. It searches bytes first, because parsing is slower."""
    needle = orjson.dumps(name)
    with open_lines(path) as lines:
        for line in lines:
            if needle in line:
                yield orjson.loads(line)


def _dropped(stage: Path, name: str) -> Iterator[str]:
    for path in sorted((stage / "dropped").glob("*.jsonl.zst")):
        for value in _lines_with(path, name):
            if name not in (value["url"], value["id"]):
                continue
            line = f"{value['id']} was dropped: {value['reason']}"
            listed = stage / "duplicates" / path.name
            for copy in _lines_with(listed, value["id"]) if listed.is_file() else ():
                if copy["dropped"] == value["id"]:
                    line += f", a copy ({copy['kind']}, similarity {copy['similarity']}) of {copy['kept']}"
            yield line


def _in_shards(shards: Path, manifests: list[Path], name: str) -> Iterator[str]:
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    if (shards / "leaks.jsonl").is_file():
        for value in _lines_with(shards / "leaks.jsonl", name):
            if name in (value["url"], value["id"]):
                likeness = f"similarity {value['similarity']} to the validation document {value['validation']}"
                yield f"shards: {value['id']} was left out of train: {likeness}"
    wanted = (pc.field("url") == name) | (pc.field("id") == name)
    for manifest in manifests:
        for path in [manifest.parent / f"{info['name']}.docs.parquet" for info in read_json(manifest)["shards"]]:
            for row in ds.dataset(path).to_table(filter=wanted).to_pylist():
                shard = path.parent / path.name.removesuffix(".docs.parquet")
                yield f"shards: {row['id']} is in {shard}, {row['tokens']:,} tokens"


def _kept(stage: Path, name: str) -> Iterator[str]:
    needle = orjson.dumps(name)
    for path in sorted(stage.glob("*.jsonl.zst")):
        with open_lines(path) as lines:
            for line in lines:
                if needle in line:
                    document = parse_document(line, where=str(path))
                    if name in (document.url, document.id):
                        yield f"{stage.name}: {document.id} is kept in {path}, {len(document.text):,} characters"
