"""The mixture as consumed: what the report counts from the ledger is what the mixture gave sample by sample."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import validate
from megagpt.data.mixture import Mixture
from megagpt.data.open_data import DataConfig
from megagpt.data.sample_ledger import LedgerWriter, entry_of
from megagpt.data.state import TrainState, Window, sample_indices
from megagpt.files import read_json, write_json
from megagpt.monitor.metrics import METRICS_FILE, format_row
from megagpt.report.consumed import MAX_SPANS, order_of, read_consumed
from megagpt.report.run_report import ReportConfig, report_run

CHANGES = [{"from_sample": 400, "weights": {"web": 1}}]
BATCH = 9


class Nothing:
    """A dataset of which only the length is asked."""

    def __len__(self) -> int:
        return 1000

    def sample(self, index: int) -> Any:
        raise NotImplementedError


def section(weights: dict[str, float], changes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    sources = {name: {"path": f"corpora/{name}", "weight": weight} for name, weight in weights.items()}
    return {"seq_len": 32, "sources": sources, "weight_changes": changes or []}


def mixture(data: dict[str, Any], begin: int = 0) -> tuple[Mixture, list[str]]:
    config = validate(DataConfig, data, source="test")
    names = list(config.sources)
    (_, weights), *changes = config.phases()
    return Mixture([Nothing()] * len(names), weights, changes, names=names, begin=begin), names


def write_run(run_dir: Path) -> tuple[Counter[str], int]:
    """A start whose weights change at a sample, with steps done twice and samples left out, and one with another source.

    Returns what stands by source, counted sample by sample, and the number of updates.
    """
    first, second = section({"web": 3, "books": 1}, CHANGES), section({"books": 1, "code": 2, "web": 5})
    states, taken_over = [], 0
    state = TrainState(skipped=(Window(100, 24),))
    for _ in range(130):
        states.append(state)
        state = state.advance(BATCH, 1)
    writer, found = LedgerWriter(run_dir), Counter[str]()
    taken_over = states[121].samples
    for attempt, data, begin, part in ((1, first, 0, states[:126]), (2, second, taken_over, states[121:])):
        drawn, names = mixture(data, begin)
        for state in part:
            writer.write(entry_of(state, BATCH, 0, attempt))
            if attempt == 2 or state.step < 121:
                found.update(names[drawn.locate(index)[0]] for index in sample_indices(state, BATCH))
        start: dict[str, Any] = {"incarnation": attempt, "config": {"data": data}, "world_size": 1, "device": "cpu"}
        if attempt == 2:
            given = {"web": 1, "books": 1}
            start["mixture"] = {"from_sample": taken_over, "given": given, "numbers": {"web": 0, "books": 1, "code": 2}}
        write_json(run_dir / "starts" / f"{attempt:04d}.json", start)
    writer.close()
    row = {"kind": "start", "step": 0, "time": 1.0, "incarnation": 1}
    (run_dir / METRICS_FILE).write_bytes(format_row(row))
    return found, len(states)


def starts_of(run_dir: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((run_dir / "starts").glob("*.json"))]


def test_samples_are_those_that_the_mixture_gave(tmp_path: Path) -> None:
    found, updates = write_run(tmp_path)
    spans = read_consumed(tmp_path, {start["incarnation"]: order_of(start) for start in starts_of(tmp_path)})
    assert len(spans) <= MAX_SPANS
    assert spans[-1].step == updates
    total = Counter[str]()
    for span in spans:
        total.update(span.samples)
        assert sum(span.samples.values()) == pytest.approx(sum(span.configured.values()))
        assert all(abs(span.samples[name] - span.configured[name]) <= 2 for name in span.samples)
    assert total == found
    assert sum(total.values()) == updates * BATCH


def test_the_report_shows_shares_beside_the_weights(tmp_path: Path) -> None:
    found, updates = write_run(tmp_path)
    text = report_run(ReportConfig(run_dir=tmp_path)).read_text()
    assert "Mixture as consumed" in text
    for name, count in found.items():
        assert f"{count:,}" in text, name
        assert f"{count / (updates * BATCH):.2%}" in text, name


def test_a_ledger_without_its_settings_is_a_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_json(tmp_path / "starts" / "0001.json", {**starts_of(tmp_path)[0], "config": {"data": {"sources": {}}}})
    text = report_run(ReportConfig(run_dir=tmp_path)).read_text()
    assert "starts/0001.json: damaged, left out" in text
    assert "ledger.jsonl" not in text
    assert "Mixture as consumed" in text, "of the other attempts"
