"""The report page: what it reads, what it says, that it needs nothing from elsewhere, and the charts' reductions."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megagpt.command import EXIT_DONE, EXIT_USER_ERROR, run_words
from megagpt.files import write_json
from megagpt.monitor.metrics import METRICS_FILE, format_row
from megagpt.report.charts import MAX_POINTS, Chart, Line, Mark, chart_data, smoothed, thin, to_svg
from megagpt.report.funnel import read_funnel
from megagpt.report.page import Bars, Card, Code, Fold, Heading, Note, Picture, Quote, Table, Tile, page
from megagpt.report.run_report import ReportConfig, distinct_names, report_run
from megagpt.terminal import safe_text

HOSTILE = "</pre><script>alert('&')</script>"


class Page(HTMLParser):
    """Collects what a browser would load, the texts, and checks that elements close."""

    void = frozenset({"meta", "br", "use", "path"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        if tag not in self.void:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self._open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif data.strip():
            self.texts.append(data)


def parse(path: Path) -> Page:
    parser = Page()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser._open == []
    return parser


def write_run(root: Path) -> Path:
    """A run of two starts, of which the first was killed, with a corpus, a checkpoint and an evaluation."""
    run_dir, corpus = root / "run", root / "corpus"
    rows: list[dict[str, Any]] = [{"kind": "start", "step": 0, "incarnation": 1, "seconds": {"start": 5.0}}]
    for attempt, steps in ((1, range(10, 61, 10)), (2, range(50, 101, 10))):
        if attempt == 2:
            rows.append({"kind": "start", "step": 40, "incarnation": 2, "seconds": {"start": 5.0}})
        for step in steps:
            values = {"loss": 5 - step / 40, "lr": 1e-3, "grad_norm": 1.0 if step != 70 else math.nan, "tokens": step * 100}
            values["tokens_per_second"] = 1000.0
            values["sources"] = {"plays": {"loss": 4 - step / 40, "targets": 75}}
            if step != 20:  # a step may have no sample of a source
                values["sources"]["news"] = {"loss": 6 - step / 40, "targets": 25}
            values |= {"step_time": {"median_seconds": 1.0}, "slow": "rank 3 on n7: own_work 0.900 s, median 0.400 s"}
            seconds = {"start": 5.0, "train": float(step), "save": 1.0}
            rows.append({"kind": "train", "step": step, "incarnation": attempt, "seconds": seconds, **values})
    score = {"loss": 2.75, "perplexity": 15.6, "bits_per_byte": 1.234, "tokens": 900, "text_bytes": 2900}
    rows.append({"kind": "evaluate", "step": 100, "incarnation": 2, "sources": {"plays": score, "news": score}, **score})
    rows.append({"kind": "sample", "step": 100, "incarnation": 2, "prompt": "O ", "text": HOSTILE})
    for step, status, message in ((80, "failed", "no space left"), (100, "written", "")):
        export = {"of_step": step, "status": status, "message": message, "duration": 4.0}
        rows.append({"kind": "export", "step": 100, "incarnation": 2, **export})
    rows.append({"kind": "done", "step": 100, "incarnation": 2})
    run_dir.mkdir(parents=True)
    lines = [format_row({"time": 1000.0 + i, **row}) for i, row in enumerate(rows)]
    (run_dir / METRICS_FILE).write_bytes(b"".join(lines))
    (run_dir / "config.yaml").write_text("seed: 1\n")
    for attempt in (1, 2):
        start = {
            "incarnation": attempt,
            "time": f"2026-01-0{attempt}T00:00:00Z",
            "host": "node-7",
            "launcher": "srun",
            "world_size": 8,
            "device": "cuda:0",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0"},
            "git_commit": "abcdef0123456789" + "+changes" * (attempt == 2),
            **({"git_diff": "0002.diff"} if attempt == 2 else {}),
            "data_fingerprint": "f00d",
            "config": {"data": {"sources": {"plays": {"path": str(corpus / "shards")}}}, "model": {"num_layers": 12}},
        }
        write_json(run_dir / "starts" / f"{attempt:04d}.json", start)
    write_json(run_dir / "checkpoints" / "step_00000100" / "manifest.json", {})
    write_json(run_dir / "checkpoints" / "best.json", {"step": 100, "validation_loss": 2.75})
    task = {
        "questions": 4,
        "accuracy": 0.75,
        "accuracy_per_byte": 0.5,
        "chance": 0.5,
        "standard_error": 0.217,
        "loss_of_gold": 3,
    }
    sources = {"plays": {**score, "unigram_entropy": 4.5}}
    write_json(
        run_dir / "evaluations" / "step_00000100.json", {"step": 100, "sources": sources, "tasks": {"piqa": task}, **score}
    )
    extract = {
        "stage": "extract",
        "documents_in": 400,
        "kept": 300,
        "rejected": {"source:mime": 100},
        "faults": {"torn gzip": 3},
    }
    dedup = {
        "stage": "dedup",
        "documents_in": 300,
        "kept": 120,
        "rejected": {"dedup:near": 150, "dedup:exact": 30},
        "faults": {},
    }
    write_json(corpus / "extract" / "summary.json", extract)
    write_json(corpus / "dedup" / "summary.json", dedup)
    for split, documents in (("train", 100), ("validation", 20)):
        shard = {"documents": documents, "tokens": documents * 50, "text_bytes": documents * 200}
        write_json(corpus / "shards" / split / "manifest.json", {"shards": [shard]})
    return run_dir


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_run(ReportConfig(run_dir=write_run(tmp_path_factory.mktemp("report"))))


def test_the_page_is_whole_and_loads_nothing(report: Path) -> None:
    found = parse(report)
    assert (report.parent.name, report.name) == ("run", "report.html")
    assert [target for target in found.loads if not target.startswith("#")] == []
    assert found.tags.count("svg") == 5
    data, library, charts = found.scripts
    assert library.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (library, charts)]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed};" in found.policy
    by_title = {chart["title"]: chart for chart in json.loads(data)}
    assert list(by_title) == ["Loss", "Training loss by source", "Learning rate", "Gradient norm", "Throughput"]
    steps = [10, 20, 30, 40, *range(50, 101, 10)]
    plays, news = by_title["Training loss by source"]["lines"]
    assert (plays["label"], news["label"]) == ("plays", "news"), "the source with the most targets first"
    assert (plays["step"], plays["y"]) == (steps, [4 - step / 40 for step in steps])
    assert (news["step"], news["y"][0]) == ([step for step in steps if step != 20], 5.75)
    style = report.read_text()
    assert "url(http" not in style
    assert "@import" not in style


def test_what_the_page_says(report: Path) -> None:
    found = parse(report)
    texts = [text.strip() for text in found.texts]

    def after(label: str, offset: int = 1) -> str:
        return texts[texts.index(label) + offset]

    assert "finished at step 100" in texts
    assert after("best validation loss") == "2.7500"
    assert after("best validation loss", 2) == "step 100, 1.234 bits per byte"
    assert after("attempts") == "2"
    assert after("attempts", 2) == "2 rows superseded"
    assert after("tokens") == "10k"
    # The two starts trained 60 s and 100 s, of which the 20 s after step 40 were done again.
    assert after("train") == "2.3 min · 81.4%"
    assert after("repeated") == "20.0 s · 11.6%"
    assert after("before extract") == "400 documents"
    assert after("after extract") == "300 · 75.0%"
    assert after("after dedup") == "120 · 30.0%"
    assert (after("rank 3 on n7"), after("rank 3 on n7", 2)) == ("own_work", "10 of 10")
    assert after("in shards") == "120 · 30.0% · 6k tokens"
    assert after("dedup:near") == "150"
    assert after("torn gzip") == "3"
    assert after("piqa") == "0.750 ± 0.217"
    assert "best: 2.7500" in texts
    assert (after("written", -1), after("written")) == ("100", "4 s")
    assert (after("failed", -1), after("failed", 2)) == ("80", "no space left")
    assert HOSTILE in texts
    assert "abcdef012345" in texts
    assert "abcdef012345 + starts/0002.diff" in texts


def test_the_funnel_of_a_corpus_that_has_not_run_is_empty(tmp_path: Path) -> None:
    assert read_funnel(tmp_path) == []


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    row = {"kind": "start", "step": 0, "time": 1.0, "incarnation": 1, "seconds": {"start": 2.0}}
    (tmp_path / METRICS_FILE).write_bytes(format_row(row) + b'{"kind": "tra')
    found = parse(report_run(ReportConfig(run_dir=tmp_path, output=tmp_path / "page.html")))
    assert "last logged at step 0, 1970-01-01 00:00:01 UTC" in found.texts
    assert "svg" not in found.tags


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import report_run as tool

    row = {"kind": "start", "step": 0, "time": 1.0, "incarnation": 1}
    (tmp_path / METRICS_FILE).write_bytes(format_row(row))
    assert run_words(ReportConfig, tool.run, "", [f"run_dir={tmp_path}"]) == EXIT_DONE
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert (tmp_path / "report.html").is_file()
    assert run_words(ReportConfig, tool.run, "", ["run_dir=no/such/run"]) == EXIT_USER_ERROR
    assert "no/such/run/metrics.jsonl" in capsys.readouterr().err


def test_thinning_keeps_the_ends_order_and_extremes() -> None:
    x = list(range(100_000))
    y = [math.sin(i / 500) for i in x]
    y[77_777], y[12_345] = 9.0, -9.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == len(thin_y) <= MAX_POINTS
    assert thin_x == sorted(set(thin_x))
    assert (77_777, 9.0) in zip(thin_x, thin_y, strict=True)
    assert (12_345, -9.0) in zip(thin_x, thin_y, strict=True)
    assert all(y[i] == value for i, value in zip(thin_x, thin_y, strict=True))


def test_smoothing_has_no_bias_from_its_start_and_passes_over_what_is_not_finite() -> None:
    assert smoothed([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert smoothed([1.0, math.nan, 3.0, math.inf], 0.5) == pytest.approx([1.0, 1.0, 7 / 3, 7 / 3])


def test_charts_are_drawn_in_the_pages_colours_and_the_same_each_time() -> None:
    lines = (Line("a", [0, 1], [2.0, 1.0], 1), Line("b", [0, 1], [3.0, 2.0], 2))
    chart = Chart("Loss", lines, (Mark(0.5, "start"),), unit="nats")
    svg = to_svg(chart)
    assert svg.startswith("<svg role=")
    assert "var(--series-1)" in svg
    assert "var(--series-2)" in svg
    assert "#0a0a0" not in svg
    assert "#0b0b0" not in svg
    assert "DejaVu" not in svg
    assert svg == to_svg(chart)


def test_every_kind_of_block_escapes_and_isolates() -> None:
    text = f"{HOSTILE} سلام 1\x1b"
    chart = Chart(text, (Line(text, [0, 1], [2.0, 1.0], 1), Line("$a$_{", [0, 1], [3.0, 2.0], 2)))
    blocks = [
        Table((text, "n"), [(text, None)], numbers=(1,)),
        Bars([(text, 0.5, text, 1)]),
        Heading(text),
        Note(text),
        Quote([(text, False), (text, True)], lead=text, where=text),
        Fold(text, [Code(text)]),
        Picture(chart),
    ]
    tiles = [Tile(text, text, text)]
    html = page(text, [Card(text, blocks)], heading=text, status=text, note=text, tiles=tiles, problems=[text])
    assert HOSTILE not in html
    assert "<script>alert" not in html
    assert "\x1b" not in html
    parser = Page()
    parser.feed(html)
    shown = safe_text(text)
    assert shown == f"{HOSTILE} \u2068سلام 1\u2069\\x1b".replace(" 1\u2069", "\u2069 1")
    assert sum(shown in found for found in parser.texts) == 21
    assert "–" in parser.texts
    assert len(parser.scripts) == 3


def test_a_page_without_charts_has_no_script() -> None:
    html = page("t", [Card("c", [Note("n")]), Card("empty", [])], heading="h")
    assert "<script" not in html
    parser = Page()
    parser.feed(html)
    assert (
        parser.policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'none'; base-uri 'none'; form-action 'none'"
    )
    assert "empty" not in html


def test_the_data_of_a_chart() -> None:
    values = [math.nan if i == 3 else float(i % 7) for i in range(5)]
    raw = Line("training", range(5), values, 1, tokens=[10.0 * i for i in range(5)], faint=True)
    smooth = Line("training (smoothed)", range(5), values, 1, derived=True)
    mark = Mark(2, "rewind", 20.0, 0.5)
    data = chart_data(Chart("Loss", (raw, smooth), (mark,), log_y=True, y_limits=(0, 1), smooth=0.5))
    assert data == {
        "title": "Loss", "log": True, "smooth": 0.5, "limits": (0, 1), "wide": False,
        "marks": [{"step": 2, "kind": "rewind", "tokens": 20.0, "hours": 0.5}],
        "lines": [{"label": "training", "series": 1, "points": False, "step": [0, 1, 2, 3, 4],
                   "tokens": [0.0, 10.0, 20.0, 30.0, 40.0], "hours": None, "y": [0.0, 1.0, 2.0, None, 4.0]}],
    }  # fmt: skip


# Damage


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("starts/0002.json", "{", r"starts/0002\.json: damaged, left out \(UserError: not valid JSON"),
        ("starts/0002.json", '{"incarnation": 2}', r"starts/0002\.json: damaged, left out \(KeyError: 'config'\)"),
        ("evaluations/step_00000100.json", "[]", r"evaluations/step_00000100\.json: damaged, left out \(AttributeError"),
        ("evaluations/step_00000100.json", '{"step": "x"}', r"step_00000100\.json: damaged, left out \(ValueError"),
        ("checkpoints/best.json", "\x00", r"checkpoints/best\.json: damaged, left out \(UserError: not valid JSON"),
        ("../corpus/dedup/summary.json", "{", r"corpus/corpus: damaged|[^ ]*/corpus: damaged, left out \(UserError"),
    ],
)
def test_a_damaged_file_is_one_line_and_the_rest_is_shown(tmp_path: Path, file: str, text: str, problem: str) -> None:
    run_dir = write_run(tmp_path)
    (run_dir / file).write_text(text)
    found = parse(report_run(ReportConfig(run_dir=run_dir)))
    (line,) = [text for text in found.texts if "damaged, left out" in text]
    assert re.search(problem, line)
    assert "finished at step 100" in found.texts


@pytest.mark.parametrize("value", ["abc", None, [1], {"a": 1}, True])
def test_rows_with_values_of_other_types_are_left_out(tmp_path: Path, value: Any) -> None:
    run_dir = write_run(tmp_path)
    rows = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    for row in rows:
        row |= dict.fromkeys(set(row) - {"kind", "step", "time", "incarnation", "seconds"}, value)
    (run_dir / METRICS_FILE).write_bytes(b"".join(map(format_row, rows)) + b"{torn\n")
    found = parse(report_run(ReportConfig(run_dir=run_dir)))
    assert "svg" not in found.tags
    assert "metrics.jsonl: 1 damaged lines left out" in found.texts


# Comparison


def test_runs_are_compared(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    path = second / "starts" / "0002.json"
    start = json.loads(path.read_text())
    start["config"] |= {"model": {"num_layers": 24}, "run_dir": "elsewhere", "optim": {"lr": 0.1}}
    write_json(path, start)
    with (second / "metrics.jsonl").open("a") as file:
        for step, prompt, text in ((110, "O ", "newer"), (110, "P ", "alone")):
            row = {"kind": "sample", "step": step, "incarnation": 2, "prompt": prompt, "text": text}
            file.write(json.dumps({"time": 0.0, "seconds": {}, **row}) + "\n")
    page_path = report_run(ReportConfig(runs=(first, second)))
    assert page_path == tmp_path / "a" / "comparison.html"
    found = parse(page_path)
    texts = [text.strip() for text in found.texts]
    assert "a/run · b/run" in texts
    at = texts.index("model.num_layers")
    assert [text for text in texts[at + 1 :] if text][:5] == ["12", "24", "optim.lr", "–", "0.1"]
    assert "elsewhere" not in texts
    shown = texts[texts.index("Generated text for the same prompts") :]
    assert shown.index("a/run, step 100") < shown.index("b/run, step 110") < shown.index("newer")
    assert "alone" not in shown
    charts = json.loads(found.scripts[0])
    assert [chart["title"] for chart in charts] == [
        "Training loss", "Validation loss", "Learning rate", "Gradient norm", "Throughput",
    ]  # fmt: skip
    line = charts[0]["lines"][1]
    assert (line["label"], line["series"]) == ("b/run", 2)
    assert line["step"] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert line["tokens"] == [100.0 * step for step in line["step"]]
    assert line["hours"][0] == pytest.approx((1 + 5) / 3600)  # the first row is 1 s after the start, which took 5 s
    assert charts[1]["lines"][0]["tokens"] == [10_000.0]  # an evaluation's tokens are those trained on by then


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of run_dir and runs"),
        (["run_dir=a", "runs=[a, b]"], "give one of run_dir and runs"),
        (["runs=[a]"], "runs: give 2 to 6 runs, not 1"),
        (["runs=[a, b/../a]"], "names a run twice"),
        (["runs=[a, b]"], "a/metrics.jsonl"),
    ],
)
def test_what_cannot_be_compared(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import report_run as tool

    assert run_words(ReportConfig, tool.run, "", words) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_names_are_as_long_as_it_takes() -> None:
    assert distinct_names([Path("/r/a/x"), Path("/r/b/y")]) == ["x", "y"]
    assert distinct_names([Path("/r/a/x"), Path("/r/b/x")]) == ["a/x", "b/x"]


def test_metrics_rows_are_json(tmp_path: Path) -> None:
    lines = (write_run(tmp_path) / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:3]] == [0, 10, 20]
