"""The report of a corpus and the story of a URL, on a small corpus that went through filters, deduplication and tokenizing."""

import html.parser
import random
import re
import shutil
from pathlib import Path

import pytest

from megagpt.config import UserError, validate
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup.dedup_documents import dedup_documents
from megagpt.corpus.filters.filter_documents import filter_documents
from megagpt.corpus.filters.registry import FilterConfig, apply_filters, build_filters
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.documents import Document, Rejected, write_documents
from megagpt.report.data_report import DataReportConfig, domain_of, read_duplicates, read_shards, report_data
from megagpt.report.inspect_data import InspectConfig, inspect
from megagpt.report.offending import cut, mark
from megagpt.report.page import Threshold
from megagpt.report.thresholds import MAX_STEPS, Measure, measure, thresholds

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
    assert page.count("<script") == 1  # of the thresholds
    with pytest.raises(UserError, match="no stage has run here"):
        report_data(DataReportConfig(work_dir=tmp_path))


def pages(number: int) -> list[Document]:
    """Texts that break the rules of the filters in many ways."""
    draw = random.Random(7)
    found = []
    for i in range(number):
        lines = [
            " ".join(draw.choices((*WORDS, "the", "and", "of", "#", "12"), k=draw.randint(2, 16)))
            + draw.choice([".", ".", "", "..."])
            for _ in range(draw.randint(1, 14))
        ]
        lines = (
            [f"- {line}" for line in lines]
            if i % 5 == 0
            else lines + lines[: draw.randint(0, len(lines))]
            if i % 5 == 1
            else lines
        )
        found.append(Document(str(i), draw.choice(["\n", "\n\n"]).join(lines), "web", None, {"language": "en"}))
    return found


ALL = FilterConfig(order=("min_length", "gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb"))


@pytest.mark.parametrize("rule", [rule for _, _, rule, _ in thresholds(ALL)])
def test_a_statistic_is_what_the_filter_compares(rule: str) -> None:
    """With this rule alone, at a threshold in the middle of what was measured, the filter drops just those beyond it."""
    name, field, *n = rule.split(".")
    config = FilterConfig(order=(name,))  # type: ignore[arg-type]
    section, documents = getattr(config, name), pages(40)
    noting = Measure(config)
    values = [noting.values(document).get(rule) for document in documents]
    known = sorted(value for value in values if value is not None)
    assert known, "no document reaches the rule"
    middle = known[len(known) // 2]
    off = {f: {} if isinstance(getattr(section, f), dict) else None for _, f, _, _ in thresholds(config)}
    off |= {field: {int(n[0]): middle} if n else middle}
    apply = build_filters(config.model_copy(update={name: section.model_copy(update=off)}))
    for document, value in zip(documents, values, strict=True):
        outcome = apply_filters(document, apply)
        beyond = value is not None and (value > middle if field.startswith("max_") else value < middle)
        assert isinstance(outcome, Rejected) == beyond, (value, middle, outcome)


def test_the_rule_that_dropped_a_text_is_named_with_its_value() -> None:
    config = FilterConfig(order=("min_length", "gopher_quality"))
    by_rule = Measure(config, decides=True)
    breach = by_rule.breach(Document("a", "a short text", "web"), "min_length:characters")
    assert breach is not None
    assert (breach.rule, breach.value, breach.limit) == ("min_length.min_characters", 12, 200)
    assert by_rule.breach(Document("a", "a" * 300, "web"), "min_length:characters") is None  # another text than was dropped
    assert by_rule.breach(Document("a", "x", "web"), "dedup:exact") is None


def test_the_distribution_keeps_its_mass_in_few_steps() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(5000)]
    (found,) = measure([({"a.max_b": value}, 2.0) for value in values], {"a.max_b": (0.75, True)})
    assert len(found.steps) <= MAX_STEPS
    assert sum(share for _, share in found.steps) == pytest.approx(1)
    assert found.dropped == pytest.approx(sum(value > 0.75 for value in values) / 5000)
    stepped = sum(share for value, share in found.steps if value > 0.75)
    assert stepped == pytest.approx(found.dropped, abs=1.1 / MAX_STEPS)
    drawn = Threshold("a.max_b", 0.75, True, found.steps, found.dropped)
    assert drawn.bounds[0] < 0.02 < 0.98 < drawn.bounds[1]
    assert 0 < sum(is_dropped for _, _, is_dropped in drawn.bars) < 15


@pytest.mark.parametrize(
    ("reason", "text", "marked"),
    [
        ("gopher_repetition:duplicate_lines", "one\ntwo\none\nthree", "one\n"),
        ("fineweb:duplicate_line_chars", "one\n\n\ntwo\ntwo", "two"),
        ("gopher_quality:too_many_bullet_lines", "- a\nb\n• c", "- a\n• c"),
        ("c4:curly_bracket", "plain\nint main() {", "int main() {"),
        ("gopher_repetition:top_2_gram", "red cat sat, red cat ran", "red catred cat"),
        ("gopher_repetition:duplicate_5_grams", "a b c d e. a b c d e.", "a b c d e."),
        ("min_length:characters", "- short", ""),
    ],
)
def test_the_offending_places_are_marked(reason: str, text: str, marked: str) -> None:
    parts = mark(text, reason)
    assert "".join(part for part, _ in parts) == text
    assert "".join(part for part, is_marked in parts if is_marked) == marked


def test_a_long_text_is_cut_around_its_first_mark() -> None:
    parts = cut([("a" * 500, False), ("b" * 10, True), ("c" * 500, False)], 100)
    shown = "".join(part for part, _ in parts)
    assert shown == "… " + "a" * 25 + "b" * 10 + "c" * 65 + " …"
    assert cut([("short", True)], 100) == [("short", True)]


def test_the_page_shows_the_kept_beside_the_dropped(work_dir: Path, tmp_path: Path) -> None:
    path = report_data(DataReportConfig(work_dir=work_dir, output=tmp_path / "r.html"))
    page = path.read_text(encoding="utf-8")
    for expected in (
        'class="pair"',
        "kept, closest to min_length.min_characters = 200",
        "min_length.min_characters = 200, here 16",
        "at least 200 (as set): drops 5.71 %",
    ):
        assert expected in page, expected


DAMAGED = {
    "shards/train/shard_00000.docs.parquet": b"no parquet",
    "dedup/duplicates": b'{"kind": 3}\n',
    "filter/rejected": b"\xff\xfe",
    "filter/stage.json": b'{"settings": {"order": ["nothing"]}}',
}


def test_damaged_files_are_named_in_one_line_each(work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work_dir, copy)
    for name, content in DAMAGED.items():
        path = copy / name
        (next(path.glob("*.zst")) if path.is_dir() else path).write_bytes(content)
    (next((copy / "dedup").glob("*.jsonl.zst"))).write_bytes(b"torn")
    page = report_data(DataReportConfig(work_dir=copy)).read_text(encoding="utf-8")
    told = [record.getMessage() for record in caplog.records if "damaged, left out" in record.getMessage()]
    assert [line.partition(":")[0] for line in told] == [
        "shards",
        "dedup/duplicates",
        "kept documents",
        "filter",
        "filter/rejected",
    ]
    assert page.count('class="problem"') == 5
    assert "From records to shards" in page
    for content in (b"[]", b'{"stage": "filter"}', b"{"):
        (copy / "filter" / "summary.json").write_bytes(content)
        with pytest.raises(UserError, match=r"filter/summary\.json: (damaged|not valid)"):
            report_data(DataReportConfig(work_dir=copy))
