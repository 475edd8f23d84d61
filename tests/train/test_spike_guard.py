"""The guard: what it calls a spike, which samples it leaves out, and whole runs over poisoned data and a NaN."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ranks import Ranks
from small_run import losses, settings, write_shards

from megagpt.command import EXIT_DONE
from megagpt.config import UserError
from megagpt.data.sample_ledger import entry_of, read_ledger
from megagpt.data.state import TrainState, Window, sample_indices
from megagpt.files import read_json, write_json
from megagpt.monitor.metrics import read_metrics
from megagpt.report.inspect_data import check_ledger
from megagpt.train.spike_guard import Guard, GuardConfig, Step, judge, merge, window_to_skip

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults"
CONFIG = GuardConfig(window_steps=32, min_steps=16)


def steps(count: int, *, noise: float = 0.02, seed: int = 0) -> list[Step]:
    """Losses that fall as they do in training, with noise."""
    rng = np.random.default_rng(seed)
    return [Step(3.0 - 0.002 * i + noise * rng.normal(), float(np.exp(0.3 * rng.normal()))) for i in range(count)]


JUDGED = [
    (Step(3.0, 1.0), ""),
    (Step(3.3, 1.0), ""),  # far out for so little noise, but no 0.5 nats
    (Step(4.5, 1.0), "loss spike: 4.5"),
    (Step(3.0, 300.0), "gradient explosion: norm 300"),
    (Step(3.0, 20.0), ""),
]


@pytest.mark.parametrize(("step", "expected"), JUDGED)
def test_what_is_a_spike(step: Step, expected: str) -> None:
    found = judge(steps(32), step, CONFIG)
    assert found.startswith(expected) if expected else found == ""
    assert judge(steps(15), step, CONFIG) == "", "there is too little to compare with"


def test_a_long_noisy_run_has_no_spike(tmp_path: Path) -> None:
    guard = Guard(GuardConfig(), tmp_path)
    assert [guard.look(s.loss, s.grad_norm) for s in steps(5000, noise=0.15)] == [""] * 5000


def test_non_finite_steps_are_left_alone_until_too_many_follow_each_other(tmp_path: Path) -> None:
    guard = Guard(CONFIG, tmp_path)
    found = [guard.look(loss, 1.0) for loss in (math.nan, math.inf, 3.0, math.nan, math.nan, math.nan, math.nan)]
    assert found == [""] * 6 + ["4 non-finite steps in a row"]


def test_it_goes_on_where_a_checkpoint_was(tmp_path: Path) -> None:
    first, second = Guard(CONFIG, tmp_path), Guard(CONFIG, tmp_path)
    for step in steps(40):
        first.look(step.loss, step.grad_norm)
    second.restore(json.loads(json.dumps(first.to_json())))
    assert second.look(4.5, 1.0) == first.look(4.5, 1.0) != ""
    second.restore(None)
    assert second.look(4.5, 1.0) == ""


def test_the_samples_to_leave_out_grow_when_it_comes_again() -> None:
    state = TrainState(step=10, samples=80)
    assert window_to_skip(state, (), 2, 8) == Window(80, 16)
    again = TrainState(step=10, samples=96, skipped=(Window(80, 16),))
    assert window_to_skip(again, (Window(80, 16),), 2, 8) == Window(88, 40)
    assert window_to_skip(TrainState(step=50, samples=400), (Window(80, 16),), 2, 8) == Window(400, 16)


@pytest.mark.parametrize(
    ("windows", "merged"),
    [
        ([(8, 4), (0, 4)], [(0, 4), (8, 4)]),
        ([(0, 4), (4, 4)], [(0, 8)]),
        ([(0, 10), (2, 3)], [(0, 10)]),
        ([(5, 5), (0, 7)], [(0, 10)]),
    ],
)
def test_windows_are_merged(windows: Sequence[tuple[int, int]], merged: Sequence[tuple[int, int]]) -> None:
    assert merge([Window(*w) for w in windows]) == tuple(Window(*w) for w in merged)


def test_the_budget_is_kept_over_starts(tmp_path: Path) -> None:
    config = GuardConfig(max_rewinds=2)
    for number in range(2):
        guard = Guard(config, tmp_path)
        guard.condemn(TrainState(step=number, samples=100 * number), "spike", global_batch_size=8, write=True)
    assert guard.apply(TrainState()).samples == 32
    assert [item["step"] for item in read_json(tmp_path / "skipped.json")] == [0, 1]
    with pytest.raises(UserError, match="max_rewinds=2"):
        Guard(config, tmp_path).condemn(TrainState(step=9, samples=900), "spike", global_batch_size=8, write=True)


def test_the_ledger_knows_of_samples_left_out_inside_a_step() -> None:
    state = TrainState(step=3, samples=24, skipped=(Window(0, 4), Window(26, 3), Window(30, 10), Window(60, 9)))
    entry = entry_of(state, 8, 7, 1)
    assert entry.skipped == (Window(26, 3), Window(30, 10))
    assert [i for start, end in entry.ranges() for i in range(start, end)] == sample_indices(state, 8)
    assert sample_indices(entry.state, 8) == sample_indices(state, 8)


# ---- whole runs

STEPS = 120
POISON = [[30, 32], [75, 76], [100, 101]]
"""Batches of noise in the data, [from, until); two batches are left out each time."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"))


def run(project: Path, shards: Path, folder: Path, **changes: Any) -> Path:
    """A run of two ranks under a guard that judges early; its directory."""
    guard = {"window_steps": 24, "min_steps": 12, "skip_steps": 2}
    values = settings(shards, folder / "run", max_steps=STEPS, guard=guard, engine={"zero_stage": 1}, **changes)
    values |= {"evaluate_every_steps": 0, "save_every_steps": 10, "optim": {"lr": 3e-3, "schedule": {"warmup_steps": 4}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = Ranks([str(project / "tools" / "train_model.py"), str(folder / "run.yaml")], 2, folder / "logs")
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    return folder / "run"


@pytest.mark.slow
def test_poisoned_windows_and_a_nan_cost_little(
    project: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes back each time, ends bitwise as one that never saw the poison, and learns what the clean run learns."""
    clean = run(project, shards, tmp_path / "clean")
    assert not (clean / "skipped.json").exists()
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    faults = [{"kind": "poisoned", "windows": POISON, "batch": 8}]
    nan = {"kind": "not_a_number", "rank": 1, "step": 20, "once": str(tmp_path / "nan")}
    monkeypatch.setenv("FAULTS", json.dumps([*faults, nan]))
    poisoned = run(project, shards, tmp_path / "poisoned")
    metrics = read_metrics(poisoned)
    assert [row["reason"].split(":")[0] for row in metrics.of_kind("rewind")] == ["loss spike"] * 3
    assert [row["step"] for row in metrics.of_kind("skip")] == [21]
    found, expected = (read_metrics(path).of_kind("evaluate")[-1]["loss"] for path in (poisoned, clean))
    assert abs(found - expected) < 0.01
    assert "all as in the shards" in "".join(check_ledger(poisoned)), "nothing that counts was fed from the poison"
    entries = read_ledger(poisoned)
    skipped = [item["start"] for item in read_json(poisoned / "skipped.json")]
    assert skipped == [30 * 8, 75 * 8, 100 * 8]
    assert [entry.step for entry in entries] == list(range(STEPS))

    # The same skip list from the beginning: nothing to see, no going back, the same numbers. Its NaN comes at the same step.
    (tmp_path / "nan").unlink()
    (tmp_path / "given" / "run").mkdir(parents=True)
    write_json(tmp_path / "given" / "run" / "skipped.json", read_json(poisoned / "skipped.json"))
    given = run(project, shards, tmp_path / "given")
    assert read_metrics(given).of_kind("rewind") == []
    assert losses(given) == losses(poisoned)
