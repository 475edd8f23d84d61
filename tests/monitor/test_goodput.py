"""Where the time went over the whole life of a run, and how often it should save."""

import math
import random
from typing import Any

import pytest

from megagpt.monitor.goodput import advise_checkpoints, daly_interval, goodput_ledger, job_times
from megagpt.monitor.metrics import Metrics, Row


def row(kind: str, step: int, time: float, attempt: int, seconds: dict[str, float], **more: Any) -> Row:
    return {"kind": kind, "step": step, "time": time, "incarnation": attempt, "seconds": seconds, **more}


LIFE = (
    # submitted at 1000, started at 1060, the first process begins at 1070
    row("start", 0, 1090.0, 1, {"start": 20.0}, job={"queued_at": 1000, "started_at": 1060}),
    row("train", 50, 1195.0, 1, {"start": 20.0, "train": 100.0, "data_wait": 5.0}),
    row("save", 50, 1200.0, 1, {"start": 20.0, "train": 100.0, "data_wait": 5.0, "save": 5.0}),
    row("train", 90, 1280.0, 1, {"start": 20.0, "train": 180.0, "data_wait": 5.0, "save": 5.0}),
    # killed; seen at 1300, queued until 1400, begins at 1410
    row("start", 50, 1430.0, 2, {"start": 15.0, "load": 5.0}, job={"queued_at": 1300, "started_at": 1400}),
    row("done", 150, 1640.0, 2, {"start": 15.0, "load": 5.0, "train": 200.0, "data_wait": 4.0, "save": 6.0}),
)


def test_every_second_of_a_life_is_accounted_for() -> None:
    ledger = goodput_ledger(Metrics(LIFE, LIFE, 0))
    assert ledger.seconds == {
        "start": 35.0, "queue": 160.0, "launch": 20.0, "down": 20.0, "load": 5.0, "train": 300.0, "repeated": 80.0,
        "data_wait": 9.0, "save": 11.0,
    }  # fmt: skip
    assert ledger.wall_seconds == 1640 - 1000
    assert ledger.goodput == pytest.approx(300 / 640)


def test_a_damaged_checkpoint_before_a_start_changes_no_account() -> None:
    damaged = row("damaged", 50, 1428.0, 2, {"start": 15.0, "load": 3.0})
    rows = (*LIFE[:4], damaged, *LIFE[4:])
    assert goodput_ledger(Metrics(rows, rows, 0)).seconds == goodput_ledger(Metrics(LIFE, LIFE, 0)).seconds


def test_without_a_job_the_time_between_is_down() -> None:
    rows = tuple({k: v for k, v in r.items() if k != "job"} for r in LIFE)
    seconds = goodput_ledger(Metrics(rows, rows, 0)).seconds
    assert seconds["down"] == 130.0
    assert not {"queue", "launch"} & seconds.keys()


def test_clocks_that_disagree_keep_the_sum() -> None:
    rows = (*LIFE[:4], LIFE[4] | {"job": {"queued_at": 1100, "started_at": 1500}}, LIFE[5])
    ledger = goodput_ledger(Metrics(rows, rows, 0))
    assert ledger.wall_seconds == pytest.approx(640)


def test_the_script_hands_the_jobs_times_over() -> None:
    environment = {"MEGAGPT_QUEUED_AT": "1000", "MEGAGPT_JOB_STARTED_AT": "1060"}
    assert job_times(environment) == {"queued_at": 1000.0, "started_at": 1060.0}
    assert job_times({}) == {}


def test_advice_counts_failures_and_costs() -> None:
    advice = advise_checkpoints(Metrics(LIFE, LIFE, 0))
    assert advice is not None
    assert (advice.failures, advice.save_seconds) == (1, 11.0)
    assert advice.seconds_between_failures == 210 + 230
    step_seconds = (380 + 9) / (90 + 100)
    assert advice.interval_steps == round(daly_interval(11.0, 440.0) / step_seconds)
    assert advise_checkpoints(Metrics(LIFE[:2], LIFE[:2], 0)) is None


def lost_share(interval: float, save: float, between: float, seed: int) -> float:
    """Share of the time lost to saves and redone work, simulated: work in segments of `interval`, failures at random."""
    rng = random.Random(seed)
    clock, useful, failure = 0.0, 0.0, rng.expovariate(1 / between)
    while useful < 3000 * between / 10:
        end = clock + interval + save
        if end <= failure:
            clock, useful = end, useful + interval
        else:
            clock, failure = failure, failure + rng.expovariate(1 / between)
    return 1 - useful / clock


def test_dalys_interval_loses_least() -> None:
    save, between = 20.0, 1800.0
    best = daly_interval(save, between)
    assert best == pytest.approx(math.sqrt(2 * save * between), rel=0.1)
    found = {factor: sum(lost_share(factor * best, save, between, seed) for seed in range(5)) / 5 for factor in (0.25, 1, 4)}
    assert found[1] < found[0.25]
    assert found[1] < found[4]
