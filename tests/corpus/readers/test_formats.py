"""Every source format: an example that is listed, split, read and named in the documentation."""

import gzip
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.config import describe
from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.extract_documents import extract_documents
from megagpt.corpus.readers.config import Format, SourceFormat
from megagpt.corpus.readers.inputs import FORMATS, format_of
from megagpt.corpus.runner.config import Execution
from megagpt.documents import read_documents

TEXT = "The harbour was quiet when the two sisters came down to the water, and nobody spoke to them."


def web(folder: Path) -> str:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + TEXT.encode()
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/\r\nContent-Type: application/http\r\n"
    head += f"Content-Length: {len(page)}\r\n\r\n"
    (folder / "a.warc.gz").write_bytes(gzip.compress(head.encode() + page + b"\r\n\r\n"))
    return str(folder / "a.warc.gz")


def wikipedia(folder: Path) -> str:
    page = f"<page><title>Harbour</title><ns>0</ns><id>1</id><revision><text>{TEXT}</text></revision></page>"
    (folder / "a.xml").write_text(f"<mediawiki>\n{page}\n</mediawiki>\n")
    return str(folder / "a.xml")


def jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text(f'{{"text": "{TEXT}"}}\n')
    return str(folder / "a.jsonl")


def text(folder: Path) -> str:
    (folder / "a.txt").write_text(TEXT)
    return str(folder / "a.txt")


def parquet(folder: Path) -> str:
    pq.write_table(pa.table({"text": [TEXT]}), folder / "a.parquet")
    return str(folder / "a.parquet")


def datasets(folder: Path) -> str:
    from datasets import Dataset

    Dataset.from_dict({"text": [TEXT]}).save_to_disk(str(folder / "a"))
    return f"datasets:{folder / 'a'}"


EXAMPLES: dict[str, Callable[[Path], str]] = {
    "web": web, "wikipedia": wikipedia, "jsonl": jsonl, "text": text, "parquet": parquet, "datasets": datasets,
}  # fmt: skip
"""Format -> a function that writes an input and returns its name."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "datasets" else ()) for name in get_args(SourceFormat)]
)
def test_every_format_is_listed_split_and_read(name: SourceFormat, tmp_path: Path) -> None:
    assert name in EXAMPLES, f"{Path(__file__).name}: no example of the format {name}"
    assert name in FORMATS, f"inputs.py: FORMATS has no row for {name}"
    path = EXAMPLES[name](tmp_path)
    assert format_of(path, "auto") == name
    try:
        summary = extract_documents(ExtractConfig(inputs=(path,)), tmp_path / "out", Execution(executor="inline"))
    except AssertionError as error:  # of assert_never
        last = traceback.extract_tb(error.__traceback__)[-2]
        pytest.fail(f"{Path(last.filename).name}: {last.name} has no case for the format {name}")
    assert (summary.kept, summary.faults) == (1, {}), f"extract_documents.py: the format {name} is not read"
    (document,) = read_documents(next((tmp_path / "out").glob("*.jsonl.zst")))
    assert TEXT in document.text


@pytest.mark.parametrize("name", get_args(SourceFormat))
def test_every_format_is_documented(name: SourceFormat, project: Path) -> None:
    page = (project / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page, f"docs/data.md does not name the format {name}"
    (row,) = (row for row in describe(ExtractConfig) if row[0] == "format")
    for ending in FORMATS[name].endings[:1]:
        assert ending in row[2], f"extract.format: its help does not name the ending {ending}"


def test_the_tables_of_formats_agree() -> None:
    missing = {*FORMATS} ^ {*get_args(SourceFormat)}
    assert not missing, (
        f"{sorted(missing)}: a format needs its name in SourceFormat (config.py) and a row in FORMATS (inputs.py)"
    )
    assert get_args(Format) == ("auto", *get_args(SourceFormat))
