"""Alerts: which rows raise one, once per pause, and that they reach metrics.jsonl and W&B."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megagpt.monitor import alerts as alerts_module
from megagpt.monitor.alerts import Alerts, disk_alert
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.metrics import METRICS_FILE, format_row, read_metrics
from megagpt.monitor.monitor import Monitor

SLOW = {"slow": "rank 3 on n7: own_work 0.900 s, median 0.400 s"}


class Seconds:
    """A clock that moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rewind_is_a_spike_unless_it_was_taken_back(tmp_path: Path) -> None:
    alerts = Alerts(tmp_path, 60)
    values = {"bad_step": 70, "reason": "the loss rose", "skipped": {"start": 5, "count": 2}}
    assert alerts.look("rewind", {**values, "taken_back": True}) == []
    assert alerts.look("rewind", values) == [
        ("spike", "step 70: the loss rose"),
        ("rewind", "back from step 70, samples left out: {'start': 5, 'count': 2}"),
    ]


@pytest.mark.parametrize(
    ("name", "bad", "why"),
    [
        ("straggler", SLOW, SLOW["slow"]),
        ("thermal", {"gpu": {"throttled": "power_cap,thermal"}}, "power_cap,thermal"),
        ("thermal", {"gpu": {}, "nodes": {"throttled": "n7 gpu 3: hardware_thermal"}}, "n7 gpu 3: hardware_thermal"),
    ],
)
def test_what_lasts_is_raised_once_per_pause(tmp_path: Path, name: str, bad: dict[str, Any], why: str) -> None:
    clock = Seconds()
    alerts = Alerts(tmp_path, 60, now=clock)
    rows = [bad] * 4 + [{"loss": 1.0}] + [bad] * 7
    assert [alerts.look("train", row) for row in rows] == [[]] * 9 + [[(name, why)], [], []]
    clock.now = 61
    assert alerts.look("train", bad) == [(name, why)]


@pytest.mark.parametrize("harmless", [{"gpu": {"throttled": "power_cap"}}, {"gpu": None, "nodes": "x"}, {"slow": ""}])
def test_what_is_usual_raises_nothing(tmp_path: Path, harmless: dict[str, Any]) -> None:
    alerts = Alerts(tmp_path, 60)
    assert [alerts.look("train", harmless) for _ in range(9)] == [[]] * 9


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "raised"), [(1_999_999, True), (2_000_000, False)])
def test_a_disk_without_room_for_two_more_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, raised: bool
) -> None:
    assert disk_alert(tmp_path) is None
    for step, size in ((10, 5), (20, 1_000_000)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        os.truncate(shutil.copy("/dev/null", folder / "data"), size)
    monkeypatch.setattr(alerts_module.shutil, "disk_usage", lambda path: Usage(0, 0, free))
    expected = f"2.0 MB free at {tmp_path}, a checkpoint takes 1.0 MB"
    assert disk_alert(tmp_path) == (expected if raised else None)
    assert Alerts(tmp_path, 60).look("save", {}) == ([("disk", expected)] if raised else [])


def test_a_hang_is_raised_by_the_next_attempt(tmp_path: Path) -> None:
    hang = {"kind": "watchdog", "step": 40, "time": 1.0, "incarnation": 1, "rank": 3, "host": "n7", "what": "waits for a lock"}
    (tmp_path / METRICS_FILE).write_bytes(format_row(hang))
    monitor = Monitor(tmp_path, MonitorConfig(), run_config={}, rank=0)
    monitor.log("start", 20)
    for step in range(21, 27):
        monitor.log("train", step, **SLOW)
    monitor.close()
    found = [(row["step"], row["alert"], row["reason"]) for row in read_metrics(tmp_path).of_kind("alert")]
    assert found == [
        (20, "stall", "attempt 1 was ended at step 40: rank 3 on n7, waits for a lock"),
        (25, "straggler", SLOW["slow"]),
    ]


def test_alerts_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    from megagpt.monitor.wandb_files import records

    monkeypatch.setenv("WANDB_MODE", "offline")
    monitor = Monitor(tmp_path / "plays", MonitorConfig(wandb="offline"), run_config={}, rank=0)
    monitor.log("start", 0)
    monitor.log("rewind", 10, bad_step=15, reason="the loss rose", skipped=None)
    monitor.close()
    (path,) = (tmp_path / "plays" / "wandb").glob("offline-run-*/run-*.wandb")
    found = [Record.FromString(payload) for payload in records(path.read_bytes())]
    raised = [(record.alert.title, record.alert.text) for record in found if record.WhichOneof("record_type") == "alert"]
    assert raised == [
        ("spike: plays", "step 10: step 15: the loss rose"),
        ("rewind: plays", "step 10: back from step 15, samples left out: None"),
    ]
    assert json.loads((tmp_path / "plays" / METRICS_FILE).read_text().splitlines()[-1])["kind"] == "alert"


def test_samples_are_rows_of_a_table_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monitor = Monitor(tmp_path / "plays", MonitorConfig(wandb="offline"), run_config={}, rank=0)
    for step in (10, 20):
        monitor.log("sample", step, prompt="O ", text=f"text {step}")
    monitor.close()
    tables = (tmp_path / "plays" / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json")
    found = [json.loads(path.read_text()) for path in tables]
    assert all(table["columns"] == ["step", "prompt", "text"] for table in found)
    assert sorted(row for table in found for row in table["data"]) == [[10, "O ", "text 10"], [20, "O ", "text 20"]]


def test_step_percentiles_and_shares(tmp_path: Path) -> None:
    from megagpt.monitor.goodput import Stopwatch

    clock = Seconds()
    monitor = Monitor(tmp_path, MonitorConfig(), run_config={}, rank=0)
    monitor.clock = Stopwatch(now=clock)
    for step in range(1, 22):
        with monitor.clock("data_wait"):
            clock.now += 1
        with monitor.clock("train"):
            clock.now += 10 if step == 11 else 1
        if monitor.due(step):
            monitor.log("train", step, loss=1.0)
        with monitor.clock("evaluate"):
            clock.now += 100
    monitor.close()
    first, second = read_metrics(tmp_path).of_kind("train")
    assert first["step_seconds"] == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert second["step_seconds"] == {"p50": 2.0, "p95": 11.0, "max": 11.0}
    assert first["shares"] == {"goodput": round(10 / 920, 6), "data_wait": round(10 / 920, 6)}
