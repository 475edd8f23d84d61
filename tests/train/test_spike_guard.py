"""The guard: what it calls a spike, which samples it leaves out, and whole runs over poisoned data and a NaN."""

import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import Ranks, wait_until
from small_run import losses, settings, start, write_shards

from megagpt.command import EXIT_DONE, EXIT_STOPPED
from megagpt.config import UserError, validate
from megagpt.data.open_data import open_data
from megagpt.data.sample_ledger import entry_of, read_ledger
from megagpt.data.state import TrainState, Window, sample_indices
from megagpt.distributed.fetch import Records
from megagpt.distributed.world import lone_world
from megagpt.engine.dtypes import declared_formats
from megagpt.files import read_json, write_json
from megagpt.monitor.metrics import read_metrics
from megagpt.monitor.monitor import Monitor
from megagpt.report.inspect_data import check_ledger
from megagpt.train.config import TrainConfig
from megagpt.train.loop import digest_settings
from megagpt.train.spike_guard import Guard, GuardConfig, Step, judge, merge, window_to_skip
from megagpt.train.step import Judge, Launched, regime_at
from megagpt.watchdog.watchdog import Watchdog, WatchdogConfig

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
    assert window_to_skip(state, 0, 2, 8) == Window(80, 16)
    again = TrainState(step=10, samples=96, skipped=(Window(80, 16),))
    assert window_to_skip(again, 1, 2, 8) == Window(88, 40)


def feed(guard: Guard, losses: Sequence[float], *, start: int, regime: dict[str, Any]) -> list[str]:
    """What a guard says of steps from `start` on."""
    found = []
    for number, loss in enumerate(losses):
        guard.enter(start + number, regime)
        found.append(guard.look(loss, 1.0))
    return found


def noisy(level: float, count: int, *, seed: int = 0) -> list[float]:
    return [level + 0.02 * float(x) for x in np.random.default_rng(seed).normal(size=count)]


@pytest.mark.parametrize("jump", [-1.5, 0.0, 0.6, 2.0, 6.0])
def test_a_planned_change_is_no_spike_and_damage_after_it_is(jump: float, tmp_path: Path) -> None:
    guard = Guard(CONFIG, tmp_path)
    assert not any(feed(guard, noisy(3.0, 40), start=0, regime={"data": 0}))
    unplanned = Guard(CONFIG, tmp_path)
    unplanned.restore(guard.to_json())
    assert any(feed(unplanned, noisy(3.0 + jump, 40), start=40, regime={"data": 0})) == (jump > 0.5)
    assert not any(feed(guard, noisy(3.0 + jump, 6), start=40, regime={"data": 1}))
    for at in (6, 10, 20, 40):  # within min_steps of the change, and later
        copy = Guard(CONFIG, tmp_path)
        copy.restore(json.loads(json.dumps(guard.to_json())))
        assert not any(feed(copy, noisy(3.0 + jump, at - 6), start=46, regime={"data": 1}))
        copy.enter(40 + at, {"data": 1})
        assert copy.look(3.0 + jump + 7.0, 1.0).startswith("loss spike")


def test_a_checkpoint_of_another_release_or_with_other_settings_begins_anew(tmp_path: Path) -> None:
    guard = Guard(CONFIG, tmp_path)
    feed(guard, noisy(3.0, 40), start=0, regime={"optim": "a"})
    saved = guard.to_json()
    assert guard.enter(40, {"optim": "a"}) == ""
    assert guard.enter(40, {"optim": "b"}) == "optim: a -> b"
    old = Guard(CONFIG, tmp_path)
    old.restore({name: saved[name] for name in ("non_finite_in_row", "loss", "grad_norm")})
    assert not any(feed(old, noisy(5.0, 40), start=40, regime={"optim": "a"}))


def test_a_verdict_that_comes_again_on_other_samples_is_taken_back(tmp_path: Path) -> None:
    """All samples are used after all, each once, and what comes from there on is what is usual."""
    guard = Guard(GuardConfig(window_steps=32, min_steps=16, skip_steps=2, max_rewinds=3), tmp_path)
    state = TrainState(step=40, samples=320)
    for count in (16, 40):  # the second begins a batch earlier and is twice as long
        window = guard.condemn(state, "loss spike: 9.0", global_batch_size=8, write=True)
        assert window is not None
        assert window.count == count
        state = guard.apply(TrainState(step=40, samples=320))
    assert state.samples == 320 + 16 + 32
    assert guard.condemn(state, "loss spike: 9.1", global_batch_size=8, write=True) is None
    assert guard.windows == ()
    assert guard.apply(state).samples == 320, "those that were passed over come back"
    again = Guard(guard.config, tmp_path)
    feed(again, noisy(3.0, 40), start=0, regime={"data": 0})
    assert not any(feed(again, noisy(9.0, 40), start=40, regime={"data": 0}))
    assert "3 entries were taken back" in again.summary()
    assert again.condemn(TrainState(step=90, samples=900), "loss spike: 8", global_batch_size=8, write=False) is not None


def test_samples_used_before_a_checkpoint_are_never_used_again(tmp_path: Path) -> None:
    """A window may reach back over samples that were used; when it is taken back they stay used."""
    guard = Guard(CONFIG, tmp_path)
    write_json(tmp_path / "skipped.json", [{"start": 72, "count": 24, "step": 9, "reason": "loss spike: 9"}])
    guard = Guard(CONFIG, tmp_path)
    passed = guard.apply(TrainState(step=10, samples=80))
    assert passed == TrainState(step=10, samples=96, skipped=(Window(80, 16),))
    cleared = Guard(CONFIG.model_copy(update={"cleared_windows": 1}), tmp_path)
    assert cleared.apply(passed).samples == 80


def test_what_is_left_out_is_told_and_can_be_cleared(tmp_path: Path) -> None:
    entries = [{"start": 80 * n, "count": 16, "step": 10 * n, "reason": "loss spike: 9"} for n in (1, 2)]
    write_json(tmp_path / "skipped.json", entries)
    off = GuardConfig(enabled=False)
    assert Guard(off, tmp_path).summary() == "32 samples in 2 windows, skipped.json"
    assert Guard(off, tmp_path).windows == (Window(80, 16), Window(160, 16))
    cleared = Guard(GuardConfig(cleared_windows=1), tmp_path)
    assert cleared.windows == (Window(160, 16),)
    assert "1 entries are cleared" in cleared.summary()
    with pytest.raises(UserError, match=r"cleared_windows=3: .*skipped.json has 2 entries"):
        Guard(GuardConfig(cleared_windows=3), tmp_path)
    assert Guard(GuardConfig(), tmp_path / "nothing").summary() == ""


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


CHANGES: dict[str, dict[str, Any]] = {
    "optim": {"optim": {"lr": 3e-3, "schedule": {"warmup_steps": 4}}},
    "max_steps": {"max_steps": 48},
    "model": {"model": {"vocab_size": 257, "seq_len": 64, "num_layers": 2, "num_heads": 2, "hidden_size": 32, "dropout": 0.1}},
    "precision": {"precision": "bf16"},
    "data": {"data": {"seq_len": 16}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_start_with_other_settings_of_this_kind_is_a_planned_change(name: str, shards: Path, tmp_path: Path) -> None:
    """A raised learning rate, a longer context, other data: what the guard is told of the first step after the start."""

    def regime(changes: dict[str, Any]) -> dict[str, Any]:
        values = settings(shards, tmp_path / "run")
        data = {**values["data"], **changes.get("data", {})}
        config = validate(TrainConfig, {**values, **changes, "data": data}, source="test")
        return regime_at(config, digest_settings(config, open_data(config.data)), TrainState(4, 32, 1024))

    before, after = regime({}), regime(CHANGES[name])
    assert before == regime({"save_every_steps": 3, "evaluate_every_steps": 0}), "what the loss does not depend on"
    assert {key for key in before if before[key] != after[key]} == {name}
    guard = Guard(CONFIG, tmp_path)
    assert guard.enter(3, before) == ""
    assert guard.enter(4, after).startswith(f"{name}: ")


def test_the_guard_reads_the_loss_and_nothing_that_training_adds_to_it(shards: Path, tmp_path: Path) -> None:
    """Two micro-batches whose loss is 2 nats together, with a z-loss of 40."""
    config = validate(TrainConfig, settings(shards, tmp_path / "run"), source="test")
    world, guard = lone_world(torch.device("cpu")), Guard(CONFIG, tmp_path)
    monitor = Monitor(config.run_dir, config.monitor, run_config={}, rank=0)
    watchdog = Watchdog(WatchdogConfig(enabled=False), world, config.run_dir, monitor.clock, 1)
    formats = declared_formats(config.precision, config.engine, config.optim)
    engine = SimpleNamespace(formats=formats, count_update=lambda applied: None)
    run: Any = SimpleNamespace(
        config=config, data=open_data(config.data), world=world, guard=guard, monitor=monitor, watchdog=watchdog,
        engine=engine, attempt=1, settings={},
    )  # fmt: skip
    losses, norm_and_applied, z_losses = [0.75, 1.25], [0.5, 1.0], [15.0, 25.0]
    record = Records(world).send(torch.tensor([*losses, *norm_and_applied, *z_losses], dtype=torch.float64))
    before = TrainState()
    step = Launched(before, before.advance(8, 256), 8, 0, 1e-3, "fp32", 2, ("z_loss",), (), record, None)
    assert Judge(run, None)(step) == ""
    assert guard.to_json()["loss"] == [2.0]
    monitor.close()
    (row,) = read_metrics(config.run_dir).of_kind("train")
    assert (row["loss"], row["z_loss"], row["grad_norm"]) == (2.0, 40.0, 0.5)


def test_batch_sizes_and_weights_of_sources_change_at_their_step(shards: Path, tmp_path: Path) -> None:
    values = settings(shards, tmp_path / "run", batch_warmup=[{"until_step": 5, "global_batch_size": 4}])
    values["data"]["weight_changes"] = [{"from_sample": 32, "weights": {"toy": 2.0}}]
    config = validate(TrainConfig, values, source="test")
    guard, state = Guard(CONFIG, tmp_path), TrainState()
    told = {}
    for step in range(10):
        told[step] = guard.enter(step, regime_at(config, {}, state))
        state = state.advance(config.batch_size_at(step), 0)
    assert {step: text for step, text in told.items() if text} == {
        5: "batch_size: 4 -> 8",
        6: "data.weight_changes: 0 -> 1",  # samples 28 to 35
    }


# ---- whole runs

STEPS = 120
POISON = [[30, 32], [75, 76], [100, 101]]
"""Batches of noise in the data, [from, until); two batches are left out each time."""


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
    (began,) = read_metrics(given).of_kind("start")
    assert began["left_out"] == "48 samples in 3 windows, skipped.json"
    told = (tmp_path / "given" / "logs" / "rank0.log").read_text()
    assert "left out of training: 48 samples in 3 windows, skipped.json, guard.enabled=true" in told
    assert losses(given) == losses(poisoned)


@pytest.mark.slow
def test_told_to_stop_while_it_goes_back_it_ends_at_once(
    project: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is committed by then, and a large checkpoint takes minutes to load."""
    mark = tmp_path / "mark"
    faults = [
        {"kind": "poisoned", "windows": [[18, 19]], "batch": 8},
        {"kind": "slow_reload", "seconds": 60, "mark": str(mark)},
    ]
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    values = settings(shards, tmp_path / "run", guard={"window_steps": 12, "min_steps": 8}, evaluate_every_steps=0)
    values["optim"] = {"lr": 3e-3, "schedule": {"warmup_steps": 4}}
    ranks = start(project, tmp_path, values, 1)
    wait_until(lambda: mark.exists() or ranks.processes[0].poll() is not None, 120)
    began = time.monotonic()
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [EXIT_STOPPED], ranks.output()
    assert time.monotonic() - began < 40  # the load takes 60
    metrics = read_metrics(tmp_path / "run")
    assert (metrics.all_rows[-1]["kind"], metrics.all_rows[-1]["step"]) == ("stop", 16)
    assert read_json(tmp_path / "run" / "skipped.json")[0]["step"] == 18


@pytest.mark.slow
def test_another_language_by_plan_is_no_spike_but_noise_in_it_is(
    project: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 50 two fifths of the samples come from text in other letters; in step 70 the data are noise."""
    other = write_shards(tmp_path / "other", letters=("xy", "yx", "-"))
    sources = {"toy": {"path": str(shards)}, "other": {"path": str(other), "weight": 1e-9}}
    change = {"from_sample": 50 * 8, "weights": {"toy": 0.6, "other": 0.4}}
    data = {"seq_len": 32, "shuffle_block": 4, "sources": sources, "weight_changes": [change]}
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS", "[]")
    plain = run(project, shards, tmp_path / "plain", data=data)
    metrics = read_metrics(plain)
    assert [(row["step"], row["change"]) for row in metrics.of_kind("planned")] == [(50, "data.weight_changes: 0 -> 1")]
    rise = losses(plain)[51] - losses(plain)[50]
    assert rise > 0.5, "without the plan it would be a spike"
    assert metrics.of_kind("rewind") == []
    faults = [{"kind": "poisoned", "windows": [[62, 63]], "batch": 8}]  # of source `toy`: those of about step 70
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    poisoned = read_metrics(run(project, shards, tmp_path / "poisoned", data=data))
    (rewind,) = poisoned.of_kind("rewind")
    assert rewind["reason"].startswith("loss spike")
    assert 66 <= rewind["bad_step"] <= 75
