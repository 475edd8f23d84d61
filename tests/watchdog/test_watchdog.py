"""The watchdog: whom it calls missing, what it says of hangs that it knows nothing of, and its silence in healthy runs."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Ranks, run_ranks
from small_run import settings, start, write_shards

from megagpt.command import EXIT_DONE, EXIT_WATCHDOG
from megagpt.data.sample_ledger import read_ledger
from megagpt.distributed.world import World
from megagpt.files import read_json
from megagpt.monitor.goodput import Stopwatch
from megagpt.monitor.metrics import read_metrics
from megagpt.watchdog import stacks
from megagpt.watchdog.watchdog import Report, Verdict, Watchdog, WatchdogConfig, judge

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults"


def report(rank: int, position: tuple[int, int], stuck: float, **more: Any) -> Report:
    return {
        "rank": rank, "host": f"n{rank}", "step": position[0], "activity": "train", "position": list(position),
        "stuck_seconds": stuck, "limit_seconds": 10.0, "collectives": 5, "ended": False, "cause": "code", "what": "here",
        "waits_for_others": False, **more,
    }  # fmt: skip


def test_the_step_of_a_verdict_is_the_last_update_done_whoever_reported_it() -> None:
    reports = {0: report(0, (8, 1), 9.0), 1: report(1, (3, 1), 0.0, activity="save")}
    verdict = judge(reports, {1: 30.0}, 10.0)
    assert verdict is not None
    assert (verdict.rank, verdict.cause, verdict.step, verdict.activity) == (1, "silent", 8, "train")


def test_nobody_is_blamed_while_all_get_on() -> None:
    reports = {rank: report(rank, (7, 1), 9.0) for rank in range(3)}
    assert judge(reports, {1: 3.0, 2: 3.0}, 10.0) is None


MISSING = {
    "behind in the loop": ([report(0, (8, 0), 11), report(1, (7, 4), 11), report(2, (8, 0), 9)], {}, 1, "code"),
    "fewer collectives": ([report(0, (7, 1), 11), report(1, (7, 1), 11), report(2, (7, 1), 12, collectives=4)], {}, 2, "code"),
    "not in the collective": (
        [report(0, (7, 1), 11, waits_for_others=True), report(1, (7, 1), 11), report(2, (7, 1), 11, waits_for_others=True)],
        {},
        1,
        "code",
    ),
    "silent": ([report(0, (7, 1), 2), report(1, (7, 1), 2)], {1: 10.5}, 1, "silent"),
    "silent long enough when others are stuck": ([report(0, (7, 1), 11), report(1, (6, 1), 1)], {1: 8.0}, 1, "silent"),
    "ended": ([report(0, (7, 1), 11), report(1, (7, 1), 0, ended=True)], {1: 9.0}, 1, "ended"),
    "never heard": ([report(0, (0, 1), 11)], {1: 12.0}, 1, "silent"),
    "in another collective": (
        [report(r, (7, 1), 11, waits_for_others=True, what="here" if r == 2 else "there") for r in range(3)],
        {},
        2,
        "code",
    ),
    "nobody": ([report(r, (7, 1), 11, waits_for_others=True, cause="collective") for r in (0, 1)], {}, None, "collective"),
}


@pytest.mark.parametrize("name", MISSING)
def test_the_missing_rank_is_the_one_the_others_wait_for(name: str) -> None:
    reports, silent, rank, cause = MISSING[name]
    verdict = judge({r["rank"]: r for r in reports}, silent, 10.0)
    assert verdict is not None
    assert (verdict.rank, verdict.cause) == (rank, cause)


def test_who_waits_for_a_long_save_elsewhere_ends_nothing() -> None:
    saving = report(0, (7, 3), 40, limit_seconds=100.0, activity="save")
    assert judge({0: saving, 1: report(1, (7, 4), 11)}, {1: 0.1}, 100.0) is None


def test_a_connection_lost_to_a_rank_that_judged_and_ended_is_no_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    world = World(1, 2, 1, torch.device("cpu"), "torchrun", None)
    clock = Stopwatch()
    first, second = (Watchdog(WatchdogConfig(enabled=False), world, tmp_path, clock, start) for start in (1, 2))
    verdict = Verdict(0, "n0", 7, "train", "code", "while True")
    first._record(verdict)
    second.end_if_judged()  # the verdict was another start's
    with pytest.raises(SystemExit, match=str(EXIT_WATCHDOG)):
        first.end_if_judged()
    assert f"rank 1 ends: {verdict.line()}" in capfd.readouterr().err


def test_what_gets_done_inside_an_activity_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch evaluated, a slice written, a module imported: each begins the time without progress anew."""
    world, clock = World(0, 1, 0, torch.device("cpu"), "none", None), Stopwatch()
    watchdog = Watchdog(WatchdogConfig(enabled=False), world, tmp_path, clock, 1)
    imports = lambda: monkeypatch.setitem(sys.modules, "a_module_that_was_imported", sys)  # noqa: E731
    with clock("evaluate"):
        for get_on in (world.progress, imports):
            watchdog.report()
            time.sleep(0.05)
            assert watchdog.report()["stuck_seconds"] >= 0.05
            get_on()
            assert watchdog.report()["stuck_seconds"] < 0.05
        assert watchdog.report()["position"] == [0, 1], "by which ranks are compared"


@pytest.mark.slow
def test_what_torch_compiles_is_progress(tmp_path: Path) -> None:
    """A graph of a long first step, when nothing is imported any more."""
    world, clock = World(0, 1, 0, torch.device("cpu"), "none", None), Stopwatch()
    watchdog = Watchdog(WatchdogConfig(enabled=False), world, tmp_path, clock, 1)

    def compile_graph(number: int) -> None:
        def add(x: torch.Tensor) -> torch.Tensor:
            return x + number

        torch._dynamo.reset()
        torch.compile(add, backend="eager")(torch.ones(2))

    compile_graph(1)  # imports what compiling needs
    modules = len(sys.modules)
    with clock("train"):
        watchdog.report()
        time.sleep(1.0)
        assert watchdog.report()["stuck_seconds"] >= 1.0
        compile_graph(2)
        assert len(sys.modules) == modules
        assert watchdog.report()["stuck_seconds"] < 1.0


# ---- real hangs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"))


HANGS = {
    "lock": ("lock", "train", "the_lock.acquire()"),
    "busy": ("code", "train", "while True"),
    "collective": ("collective", "train", "all_reduce"),
    "stopped": ("silent", "train", "no report for"),
    "interpreter": ("silent", "train", "no report for"),
    "loader": ("loader", "data_wait", "time.sleep(3600)"),
    "loader_file": ("file system", "data_wait", "block_on_fifo"),
    "loader_dead": ("loader", "data_wait", "never comes"),
    "save_file": ("file system", "save", "block_on_fifo"),
    "evaluation": ("code", "evaluate", "time.sleep(3600)"),
}
"""Fault: the cause, the activity, and a part of the explanation."""


LEFT_TO_THEMSELVES = ("stopped", "interpreter")
"""Faults after which rank 1 cannot end itself; srun or a launcher does."""


def hang(kind: str, shards: Path, project: Path, folder: Path) -> dict[str, Any]:
    """Train until rank 1 hangs in a way that nothing in the trainer knows of: its verdict, with rank 0's output and the seconds
    from the hang to its end."""
    fault = {"kind": kind, "rank": 1, "step": 8, "batch": 8, "once": str(folder / "happened")}
    # Time enough for a loaded machine; the save has the longer limit.
    limits = {"stall_seconds": 6.0, "long_seconds": 12.0 if kind in ("save_file", "evaluation") else 60.0}
    values = settings(shards, folder / "run", watchdog=limits, max_steps=2000, engine={"kind": "fsdp"})
    values |= {"evaluate_every_steps": 0, "save_every_steps": 8 if kind in ("save_file", "evaluation") else 1000}
    values |= {"evaluate_every_steps": 8} if kind == "evaluation" else {}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    size = 3 if kind == "collective" else 2  # who is in another collective than the others needs a majority
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        patch.setenv("FAULTS", json.dumps([fault]))
        ranks = Ranks([str(project / "tools" / "train_model.py"), str(folder / "run.yaml")], size, folder / "logs")
    try:
        assert ranks.processes[0].wait(900) == EXIT_WATCHDOG, ranks.output()
        if kind not in LEFT_TO_THEMSELVES:
            assert ranks.processes[1].wait(900) == EXIT_WATCHDOG, ranks.output(1)
        seconds = time.time() - (folder / "happened").stat().st_mtime
    finally:
        ranks.kill()
    (path,) = (folder / "run" / "watchdog").glob("*.json")
    return {**read_json(path), "output": ranks.output(), "seconds_to_end": seconds, "size": size}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_is_named_and_ended(kind: str, shards: Path, project: Path, tmp_path: Path) -> None:
    verdict = hang(kind, shards, project, tmp_path)
    cause, activity, words = HANGS[kind]
    assert (verdict["rank"], verdict["cause"], verdict["activity"]) == (1, cause, activity), verdict
    assert words in verdict["what"]
    assert f"rank 1 on {os.uname().nodename} is missing" in verdict["output"]
    (row,) = read_metrics(tmp_path / "run").of_kind("watchdog")
    assert row["cause"] == cause
    assert 5 < row["seconds"]["hang"] < 60, "of its seconds the wait is told apart"
    done = read_ledger(tmp_path / "run")[-1].step + 1
    assert row["step"] == done, "the updates done"
    if kind == "evaluation":
        assert (tmp_path / "run" / "checkpoints" / f"step_{done:08d}" / "manifest.json").is_file()
    # What was found fast enough shows in seconds; the machine may be loaded.
    assert verdict["seconds_to_end"] < 60
    if kind == "collective":
        assert "gloo:all_reduce [7] Float" in verdict["collectives"]
    dumps = {file.name for file in (tmp_path / "run" / "watchdog" / "collectives_0001").iterdir()}
    assert dumps == {f"rank_{rank}" for rank in range(verdict["size"]) if rank == 0 or kind not in LEFT_TO_THEMSELVES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow_evaluation", "slow_save"])
def test_what_takes_longer_than_the_limit_but_gets_on_is_no_hang(
    kind: str, shards: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of six windows a rank, and a save of some sixty slices: each takes longer than long_seconds."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    seconds = {"slow_evaluation": 3.0, "slow_save": 0.4}[kind]
    monkeypatch.setenv("FAULTS", json.dumps([{"kind": kind, "seconds": seconds, "mark": str(tmp_path / "mark")}]))
    limits = {"stall_seconds": 10.0, "long_seconds": 12.0}
    values = settings(shards, tmp_path / "run", max_steps=2, watchdog=limits, engine={"kind": "fsdp"}, save_in_background=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = Ranks([str(project / "tools" / "train_model.py"), str(tmp_path / "run.yaml")], 2, tmp_path / "logs")
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    spent = read_metrics(tmp_path / "run").of_kind("done")[0]["seconds"]
    assert spent["evaluate" if kind == "slow_evaluation" else "save"] > 14


@pytest.mark.slow
def test_a_rank_that_is_long_alone_with_something_is_waited_for_beyond_the_limit_of_a_collective(
    shards: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the watchdog's, which looks at progress; half an hour of a collective is 15 seconds here."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    slow = {"kind": "slow_load", "rank": 1, "seconds": 30.0, "mark": str(tmp_path / "mark")}
    monkeypatch.setenv("FAULTS", json.dumps([{"kind": "short_waits", "seconds": 15.0}, slow]))
    ranks = start(project, tmp_path, settings(shards, tmp_path / "run", max_steps=2, engine={"kind": "fsdp"}))
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert read_metrics(tmp_path / "run").of_kind("done")[0]["seconds"]["load"] > 30


def healthy(world: Any, run_dir: str, steps: int) -> tuple[int, float]:
    """A loop with collectives that get on; (verdicts, added CPU seconds per step)."""
    clock = Stopwatch()
    watchdog = Watchdog(WatchdogConfig(stall_seconds=20, long_seconds=60), world, Path(run_dir), clock, 1)
    began = time.process_time()
    for step in range(steps):
        watchdog.beat(step)
    cost = (time.process_time() - began) / steps
    for step in range(steps):
        watchdog.beat(step)
        with clock("train"):
            world.sum([step])
    watchdog.close()
    return len(list(Path(run_dir).glob("watchdog/*"))), cost


@pytest.mark.slow
def test_two_thousand_healthy_steps_have_no_verdict(tmp_path: Path) -> None:
    for verdicts, cost in run_ranks(healthy, 2, tmp_path / "ranks", str(tmp_path / "run"), 2000):
        assert verdicts == 0
        assert cost < 1e-3  # seconds of CPU per step; about a microsecond, generous for a loaded machine


@pytest.mark.slow
def test_a_slow_rank_is_named_in_the_metrics(
    shards: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP all ranks are as slow as the slowest; it is the one that does not wait in collectives."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    monkeypatch.setenv("FAULTS", json.dumps([{"kind": "slow", "rank": 1}]))
    limits = {"stall_seconds": 4.0, "long_seconds": 200.0}
    values = settings(shards, tmp_path / "run", max_steps=90, watchdog=limits, engine={"kind": "fsdp"}, micro_batch_size=4)
    values |= {"evaluate_every_steps": 0, "save_every_steps": 1000, "monitor": {"log_every_steps": 10}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = Ranks([str(project / "tools" / "train_model.py"), str(tmp_path / "run.yaml")], 2, tmp_path / "logs")
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    rows = [row for row in read_metrics(tmp_path / "run").of_kind("train") if "own_work" in row]
    assert rows
    assert rows[-1]["own_work"]["max_rank"] == 1
    assert rows[-1]["collective_wait"]["max_rank"] == 0
    assert rows[-1]["own_work"]["max_seconds"] > 0.1
    assert any("rank 1 on" in row.get("slow", "") for row in rows)


def test_a_fetch_from_the_device_is_waiting_for_others() -> None:
    """A GPU's queue holds a collective that another rank does not join: the host sleeps in the driver, or spins."""
    outer = "/x/megagpt/train/step.py:120 __call__: rows = step.record.read()"
    fetch = "/x/megagpt/distributed/fetch.py:30 read: self._ready.synchronize()"
    torch_frame = "/y/torch/cuda/streams.py:233 synchronize: super().synchronize()"
    for stack, call in (
        ((outer, fetch, torch_frame), "ioctl /dev/nvidiactl"),
        ((outer, fetch), "running"),
        ((outer, "/y/deepspeed/runtime/zero/stage3.py:3042 has_overflow: overflow = overflow_gpu[0].item()"), "futex"),
        ((outer, fetch.replace("read: self._ready.synchronize()", "fetched: return values.tolist()")), "futex"),
    ):
        thread = stacks.Thread("MainThread", stack, call)
        assert stacks.waits_for_others([thread])
        assert stacks.explain([thread], "train")[0] == "device"
    launching = stacks.Thread("MainThread", (outer,), "ioctl /dev/nvidia0")
    assert not stacks.waits_for_others([launching])
    assert stacks.explain([launching], "train")[0] == "code", "a GPU's device file is no file system"
