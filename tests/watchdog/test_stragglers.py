"""Who is slow, from what the ranks report of themselves."""

from typing import Any

import pytest

from megagpt.watchdog.stragglers import MIN_LOOKS, RankTimes, count_slow, step_seconds, summarise, waiting_seconds


def progress(steps: int, **seconds: float) -> dict[str, float]:
    return {"steps": steps, "looks": 0.0, "forward": 0.0, "collective": 0.0, **seconds}


def test_slow_ranks_are_named() -> None:
    rates = {"data_wait": {0: 0.01, 1: 0.01, 2: 0.2}, "forward": {0: 1.0, 1: 1.2, 2: 1.1}}
    found = summarise(rates, {0: "a", 1: "b", 2: "c"}, 1.5)
    assert found["data_wait"] == {"median_seconds": 0.01, "max_seconds": 0.2, "max_rank": 2}
    assert found["slow"] == "rank 2 on c: data_wait 0.200 s, median 0.010 s"


def test_who_waits_in_collectives_is_not_slow_but_who_lets_wait() -> None:
    rates = {"step_time": dict.fromkeys(range(3), 1.0), "collective_wait": {0: 0.8, 1: 0.75, 2: 0.1}}
    rates["own_work"] = {rank: 1.0 - waited for rank, waited in rates["collective_wait"].items()}
    found = summarise(rates, {0: "a", 1: "b", 2: "c"}, 1.5)
    assert found["slow"] == "rank 2 on c: own_work 0.900 s, median 0.250 s"
    assert found["collective_wait"]["max_rank"] == 0
    rates["own_work"] = {0: 0.1, 1: 0.1, 2: 0.2}  # twice as much, but no more of a step than looks may be wrong by
    assert "slow" not in summarise(rates, {0: "a", 1: "b", 2: "c"}, 1.5)


def test_a_step_is_what_is_not_outside_of_steps() -> None:
    earlier = progress(10, train=5.0, data_wait=1.0, save=3.0)
    later = progress(20, train=15.0, data_wait=2.0, save=9.0, other=0.5, forward=4.0, collective=6.0, looks=MIN_LOOKS)
    assert step_seconds(earlier, later) == pytest.approx({"step_time": 1.15, "data_wait": 0.1, "forward": 0.4})
    assert waiting_seconds(earlier, later) == pytest.approx({"collective_wait": 0.6, "own_work": 0.45})
    assert waiting_seconds(earlier, {**later, "looks": MIN_LOOKS - 1}) == {}
    assert step_seconds(later, later) == {}


def test_looks_are_collected_over_several_calls() -> None:
    def reports(step: int, *looks: float) -> dict[int, Any]:
        waits = (0.9, 0.1)
        return {
            r: {"host": f"n{r}", "progress": progress(step, train=float(step), collective=waits[r] * step, looks=looks[r])}
            for r in (0, 1)
        }

    times = RankTimes(1.5)
    assert times.summary({0: {"host": "n0", "progress": {"steps": -1}}}) == {}
    assert times.summary(reports(0, 0, 0)) == {}
    first = times.summary(reports(10, MIN_LOOKS / 2, MIN_LOOKS))
    assert first["step_time"]["median_seconds"] == 1.0
    assert "own_work" not in first
    second = times.summary(reports(20, MIN_LOOKS, 2 * MIN_LOOKS))
    assert second["own_work"]["max_rank"] == 1
    assert second["own_work"]["max_seconds"] == 0.9
    assert second["slow"].startswith("rank 1 on n1: own_work 0.900 s")
    assert times.summary(reports(20, MIN_LOOKS, 2 * MIN_LOOKS)) == {}


def test_looks_may_be_enough_while_some_rank_has_made_no_new_step() -> None:
    def report(rank: int, step: int, looks: float) -> dict[str, Any]:
        return {"host": f"n{rank}", "progress": progress(step, train=float(step), collective=0.1 * step, looks=looks)}

    times = RankTimes(1.5)
    times.summary({0: report(0, 0, 0), 1: report(1, 0, 0)})
    assert "own_work" not in times.summary({0: report(0, 9, MIN_LOOKS / 2), 1: report(1, 10, MIN_LOOKS)})
    found = times.summary({0: report(0, 10, MIN_LOOKS), 1: report(1, 10, MIN_LOOKS)})
    assert "step_time" not in found
    assert found["own_work"]["median_seconds"] == pytest.approx(0.9)


def test_after_the_guard_went_back_times_begin_anew() -> None:
    def reports(step: int, seconds: float) -> dict[int, Any]:
        return {0: {"host": "n0", "progress": progress(step, train=seconds)}}

    times = RankTimes(1.5)
    times.summary(reports(1000, 1000.0))
    assert times.summary(reports(500, 1001.0)) == {}
    assert times.summary(reports(510, 1011.0))["step_time"]["median_seconds"] == 1.0


def test_the_report_counts_who_was_named() -> None:
    rates = {"data_wait": {0: 0.01, 1: 0.01, 2: 0.2}, "forward": {0: 1.0, 1: 3.0, 2: 1.1}}
    both = summarise(rates, {0: "a", 1: "b", 2: "c"}, 1.5)["slow"]
    again = summarise({"data_wait": {0: 0.01, 1: 0.01, 2: 0.3}}, {0: "a", 1: "b", 2: "c"}, 1.5)["slow"]
    found = count_slow([both, "", again])
    assert list(found) == [("rank 2 on c", "data_wait"), ("rank 1 on b", "forward")]
    assert found["rank 2 on c", "data_wait"] == (2, "0.300 s, median 0.010 s")
