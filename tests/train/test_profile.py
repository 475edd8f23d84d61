"""The profiler's window: which updates and ranks it records, and traces that can be read; and the history of allocations."""

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import UserError, validate
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.monitor.goodput import Stopwatch
from megagpt.train.out_of_memory import allocations
from megagpt.train.profile import ProfileConfig, StepProfiler, history_options, remember_allocations


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


def test_torch_takes_the_options_of_the_history() -> None:
    record = torch.cuda.memory._record_memory_history
    bound = inspect.signature(record).bind(**history_options(50), device=torch.device("cuda", 0)).arguments
    assert bound["max_entries"] == 50
    documented = inspect.getdoc(record) or ""
    for name in ("enabled", "context", "stacks"):
        choices = documented.partition(f"{name} (Literal[")[2].partition("]")[0]
        assert f'"{bound[name]}"' in choices


def test_a_cpu_has_no_history_of_allocations(caplog: pytest.LogCaptureFixture) -> None:
    remember_allocations(ProfileConfig(), torch.device("cpu"))
    assert caplog.messages == []
    remember_allocations(ProfileConfig(allocation_history=50), torch.device("cpu"))
    assert caplog.messages == ["profile.allocation_history=50: nothing is kept on cpu, only GPUs have a history"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_says_which_lines_made_its_allocations() -> None:
    device = torch.device("cuda", 0)
    config = ModelConfig(vocab_size=256, seq_len=64, num_layers=1, num_heads=2, hidden_size=32)
    remember_allocations(ProfileConfig(allocation_history=1000), device)
    try:
        with device:
            model = GPT(config)
            ids = torch.zeros(2, 64, dtype=torch.long)
        loss = model(ids, ids)
        found = allocations(torch.cuda.memory._snapshot(device)["segments"], [])
        assert loss.requires_grad  # what the pass keeps is alive
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert any("made by forward (gpt.py:" in item.what for item in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": [5, 3]}, r"profile.steps=\[5, 3\]: \[first, last\] with 1 <= first <= last is expected"),
        ({"steps": [0, 3]}, r"profile.steps=\[0, 3\]: \[first, last\]"),
        ({"ranks": [-1]}, r"profile.ranks=\[-1\]: ranks are counted from 0"),
        ({"ranks": []}, "ranks"),
        ({"allocation_history": -1}, "allocation_history"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ProfileConfig, values, source="test")
