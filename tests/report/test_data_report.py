"""The report of a corpus and the story of a URL, on a small corpus that went through filters, deduplication and tokenizing."""

import html.parser
import random
import re
from pathlib import Path

import pytest

from megagpt.config import UserError, validate
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup.dedup_documents import dedup_documents
from megagpt.corpus.filters.filter_documents import filter_documents
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.documents import Document, write_documents
from megagpt.report.data_report import DataReportConfig, domain_of, read_duplicates, read_shards, report_data
from megagpt.report.inspect_data import InspectConfig, inspect

WORDS = ("harbour", "sister", "water", "basket", "dawn", "cliff", "storm", "winter", "fisherman", "net", "church", "hill")


def text(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=60)) + "."


def corpus() -> list[Document]:
    """30 good pages, two copies, an edit, and two short pages."""
    pages = [
        Document(f"d.warc:{i}", text(i), "web" if i % 3 else "wiki", f"http://www.host{i % 4}.org/p{i}", {"language": "en"})
        for i in range(30)
    ]
    copies = [Document(f"d.warc:copy{i}", pages[i].text, "web", f"http://mirror.net/{i}") for i in (3, 4)]
    edit = Document("d.warc:edit", pages[3].text + " The end.", "web", "http://mirror.net/edit")
    short = [Document(f"d.warc:short{i}", "Too <b>short</b>", "web", f"http://short.com/{i}") for i in range(2)]
    return [*pages, *copies, edit, *short]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "d.jsonl.zst", corpus())
    values = {
        "work_dir": str(folder),
        "filter": {"order": ["min_length"]},
        "executor": "inline",
        "tokenize": {"tokenizer": "bytes", "validation_fraction": 0.2, "shard_tokens": 4000},
    }
    config = validate(CorpusConfig, values, source="test")
    filter_documents(config.filter, [folder / "d.jsonl.zst"], folder / "filter", config)
    dedup_documents(config.dedup, config.inputs("dedup"), folder / "dedup", config)
    pack_documents(config.inputs("shards"), folder / "shards", "bytes", config.tokenize, config)
    return folder


def story(work_dir: Path, url: str) -> list[str]:
    return list(inspect(validate(InspectConfig, {"work_dir": str(work_dir), "url": url}, source="test")))


def test_the_story_of_a_url(work_dir: Path) -> None:
    assert story(work_dir, "http://short.com/1") == ["filter: d.warc:short1 was dropped: min_length:characters"]
    kept = "a copy (exact, similarity 1.0) of d.warc:3"
    assert story(work_dir, "http://mirror.net/3") == [f"dedup: d.warc:copy3 was dropped: dedup:exact, {kept}"]
    near = r"dedup: d\.warc:edit was dropped: dedup:near, a copy \(near, similarity 0\.\d+\) of d\.warc:3"
    assert re.fullmatch(near, story(work_dir, "d.warc:edit")[0])
    (line,) = story(work_dir, "http://www.host1.org/p5")
    assert re.fullmatch(rf"shards: d\.warc:5 is in .*/shards/(train|validation)/shard_\d+, {len(text(5)) + 1} tokens", line)
    assert story(work_dir, "d.warc:5") == [line]
    with pytest.raises(UserError, match=r"url=http://www\.host1\.org/p: no document in"):
        story(work_dir, "http://www.host1.org/p")


def test_without_shards_the_last_stage_is_searched(work_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "filter").symlink_to(work_dir / "filter")
    (line,) = story(tmp_path, "http://www.host1.org/p5")
    assert line == f"filter: d.warc:5 is kept in {tmp_path}/filter/d.jsonl.zst, {len(text(5))} characters"


def test_totals_are_those_of_the_corpus(work_dir: Path) -> None:
    shards, duplicates = read_shards(work_dir), read_duplicates(work_dir, 5)
    documents = corpus()[:30]
    assert sum(split["documents"] for split in shards.splits) == 30
    assert shards.sources == {
        source: sum(len(d.text) + 1 for d in documents if d.source == source) for source in ("web", "wiki")
    }
    assert shards.domains == {
        f"host{i}.org": sum(len(d.text) + 1 for d in documents if f"host{i}" in str(d.url)) for i in range(4)
    }
    assert shards.lengths == {9: 30}  # 256 to 511 bytes
    assert duplicates.kinds == {"exact": 2, "near": 1}
    assert duplicates.most_copied == [("d.warc:3", 2), ("d.warc:4", 1)]
    assert sum(duplicates.similarities.values()) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://www.Example.org:8080/a?b", "example.org"),
        ("sub.example.org/x", "sub.example.org"),
        ("http://[broken", "(none)"),
        ("", "(none)"),
    ],
)
def test_domains(url: str, expected: str) -> None:
    assert domain_of(url) == expected


class Tags(html.parser.HTMLParser):
    """Collects what a page would load, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_it_all_and_loads_nothing(work_dir: Path, tmp_path: Path) -> None:
    path = report_data(DataReportConfig(work_dir=work_dir, output=tmp_path / "r.html", num_examples=1))
    page = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    for expected in (
        "35 documents",
        "33 · 94.3%",
        "30 · 85.7%",
        "min_length:characters",
        "dedup:near",
        "256 to 511 tokens",
        "host1.org",
        "2 exact, 1 near",
        "d.warc:3",
        "Too &lt;b&gt;short&lt;/b&gt;",
        "filter · min_length:characters · 2",
    ):
        assert expected in page, expected
    assert page.count("Too &lt;b&gt;") == 1
    assert "<script" not in page
    with pytest.raises(UserError, match="no stage has run here"):
        report_data(DataReportConfig(work_dir=tmp_path))
