"""The profiler's window: which updates and ranks it records, and traces that can be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import UserError, validate
from megagpt.monitor.goodput import Stopwatch
from megagpt.train.profile import ProfileConfig, StepProfiler


def run_updates(profiler: StepProfiler, first: int, last: int) -> None:
    """Updates with a matrix product as large as their number."""
    for step in range(first - 1, last):
        profiler.before(step)
        torch.ones(step + 1, 3) @ torch.ones(3, 2)
        profiler.after(step + 1)


def products(path: Path) -> list[int]:
    """Rows of the matrix products in a trace, in order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = [event for event in events if event.get("name") == "aten::mm"]
    return [event["args"]["Input Dims"][0][0] for event in sorted(found, key=lambda event: event["ts"])]


@pytest.mark.parametrize(
    ("begin", "end", "name", "recorded"),
    [
        (1, 9, "steps_3_to_5", [3, 4, 5]),
        (4, 9, "steps_4_to_5", [4, 5]),  # a restart inside the window
        (1, 4, "steps_3_to_4", [3, 4]),  # the run ends inside it
    ],
)
def test_the_window_is_recorded(tmp_path: Path, begin: int, end: int, name: str, recorded: list[int]) -> None:
    clock = Stopwatch()
    profiler = StepProfiler(ProfileConfig(steps=(3, 5), ranks=(1,)), tmp_path, 1, 2, clock)
    run_updates(profiler, begin, end)
    if end > 5:
        run_updates(profiler, 3, 6)  # a rewind records it not again
    profiler.close()
    profiler.close()
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == f"attempt_0002_rank_0001_{name}.json.gz"
    assert products(path) == recorded
    assert clock.seconds()["save"] > 0


@pytest.mark.parametrize(("config", "rank"), [(ProfileConfig(), 0), (ProfileConfig(steps=(3, 5)), 1)])
def test_nothing_is_recorded_elsewhere(tmp_path: Path, config: ProfileConfig, rank: int) -> None:
    profiler = StepProfiler(config, tmp_path, rank, 1, Stopwatch())
    run_updates(profiler, 1, 9)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profiles").write_text("")
    profiler = StepProfiler(ProfileConfig(steps=(1, 1)), tmp_path, 0, 1, Stopwatch())
    run_updates(profiler, 1, 2)
    (message,) = caplog.messages
    assert "attempt_0001_rank_0000_steps_1_to_1.json.gz: the trace could not be written: " in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": [5, 3]}, r"profile.steps=\[5, 3\]: \[first, last\] with 1 <= first <= last is expected"),
        ({"steps": [0, 3]}, r"profile.steps=\[0, 3\]: \[first, last\]"),
        ({"ranks": [-1]}, r"profile.ranks=\[-1\]: ranks are counted from 0"),
        ({"ranks": []}, "ranks"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ProfileConfig, values, source="test")
