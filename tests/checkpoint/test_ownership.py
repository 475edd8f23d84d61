"""Who owns a run: an owner that is alive keeps it, one that is dead does not, and one that has lost it learns it in seconds."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, wait_until

from megagpt.checkpoint import ownership
from megagpt.checkpoint.ownership import HEARTBEAT_SECONDS, SILENT_SECONDS, Ownership, owner_of, take_ownership, take_run
from megagpt.config import Failure, UserError
from megagpt.distributed.world import World, lone_world
from megagpt.files import read_json, write_json

OWNER = """
import sys, time
from pathlib import Path
import torch
from megagpt.checkpoint.ownership import take_run
from megagpt.distributed.world import lone_world
world = lone_world(torch.device("cpu"))
print("looks", flush=True)
owned = take_run(Path(sys.argv[1]), world, sys.argv[2])
print("owns", owned.attempt, flush=True)
while not world.stop.signal_name:
    time.sleep(0.05)
print(world.stop.signal_name, flush=True)
owned.close()
"""


def alone() -> World:
    return lone_world(torch.device("cpu"))


class Other:
    """A start of the run in another process."""

    def __init__(self, run_dir: Path, if_running: str = "refuse", **environment: str) -> None:
        words = [sys.executable, "-c", OWNER, str(run_dir), if_running]
        self.process = subprocess.Popen(
            words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """The next line it prints after that it looks; "" if it ends, or is ended because it says nothing."""
        line = self.any_line()
        return self.any_line() if line == "looks" else line

    def any_line(self) -> str:
        assert self.process.stdout is not None
        silent = threading.Timer(120, self.process.kill)
        silent.start()
        try:
            return self.process.stdout.readline().strip()
        finally:
            silent.cancel()

    def error(self) -> str:
        return self.process.communicate(timeout=900)[1]


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def begin(*words: str, **environment: str) -> Other:
        started.append(Other(tmp_path, *words, **environment))
        return started[-1]

    yield begin
    for item in started:
        item.process.kill()
        item.process.communicate()


@pytest.mark.slow
def test_an_owner_that_is_alive_keeps_the_run(tmp_path: Path, other: Callable[..., Other]) -> None:
    first = other()
    assert first.line() == "owns 1"
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"attempt 1 \(host .*, process {first.process.pid}\) is alive: end it first"):
        take_run(tmp_path, alone())
    assert time.monotonic() - started < SILENT_SECONDS, "it was not seen to be alive, but waited for"
    assert owner_of(tmp_path) == 1


@pytest.mark.slow
def test_who_takes_over_is_heard_within_seconds(tmp_path: Path, other: Callable[..., Other]) -> None:
    first = other()
    assert first.line() == "owns 1"
    owned = take_run(tmp_path, alone(), "take_over")
    assert owned is not None
    assert owned.attempt == 2
    started = time.monotonic()
    assert first.line() == "a later start that has taken the run over"
    assert time.monotonic() - started < 10 * HEARTBEAT_SECONDS
    assert first.process.wait(600) == 0
    assert read_json(tmp_path / "heartbeat.json")["incarnation"] == 2, "the older one wrote after it had lost the run"
    owned.close()
    assert read_json(tmp_path / "heartbeat.json")["ended"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_of_this_machine_is_followed_at_once(number: int, tmp_path: Path, other: Callable[..., Other]) -> None:
    first = other()
    assert first.line() == "owns 1"
    first.process.send_signal(number)
    first.process.wait()
    started = time.monotonic()
    owned = take_run(tmp_path, alone())
    assert owned is not None
    owned.close()
    assert owned.attempt == 2
    assert time.monotonic() - started < SILENT_SECONDS, "it was watched"


@pytest.mark.slow
def test_waiting_ends_with_the_owner(tmp_path: Path, other: Callable[..., Other]) -> None:
    first = other()
    assert first.line() == "owns 1"
    second = other("wait")
    assert second.any_line() == "looks"
    time.sleep(3 * HEARTBEAT_SECONDS)
    assert second.process.poll() is None
    assert owner_of(tmp_path) == 1
    first.process.kill()
    assert second.line() == "owns 2"


@pytest.mark.slow
def test_a_stop_signal_ends_the_waiting(tmp_path: Path, other: Callable[..., Other]) -> None:
    first = other()
    assert first.line() == "owns 1"
    world = alone()
    world.stop.request("SIGTERM")
    assert take_run(tmp_path, world, "wait") is None
    assert owner_of(tmp_path) == 1


def elsewhere(**changes: Any) -> dict[str, Any]:
    """The heartbeat of an owner on another machine."""
    return {**ownership._myself(), "incarnation": 1, "beat": 5, "ended": False, "boot_id": "another", **changes}


def test_an_owner_on_another_machine_is_watched_before_it_counts_as_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 2.0)
    write_json(tmp_path / "owner.json", {"incarnation": 1})
    write_json(tmp_path / "heartbeat.json", elsewhere())
    started = time.monotonic()
    owned = take_run(tmp_path, alone())
    assert owned is not None
    owned.close()
    assert (owned.attempt, time.monotonic() - started > 2) == (2, True)


class Clock:
    """A watching start's own clock: it sleeps in no time, and calls `meanwhile` at every second of its sleep."""

    def __init__(self, meanwhile: Callable[[float], None]) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        if int(self.now) > int(before):
            self._meanwhile(self.now)


def test_a_start_that_waits_for_the_first_beat_of_a_live_owner_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk shows the owner's heartbeat only after a while, but before the owner would count as dead."""
    write_json(tmp_path / "owner.json", {"incarnation": 1})
    write_json(tmp_path / "heartbeat.json", elsewhere())
    shown_at = SILENT_SECONDS - 2

    def beat(now: float) -> None:
        if now >= shown_at:
            write_json(tmp_path / "heartbeat.json", elsewhere(beat=6))

    clock = Clock(beat)
    monkeypatch.setattr(ownership, "time", clock)
    with pytest.raises(UserError, match=r"attempt 1 \(host .* is alive: end it first, or take the run"):
        take_run(tmp_path, alone())
    assert clock.now >= shown_at
    assert owner_of(tmp_path) == 1
    assert not (tmp_path / "starts").exists(), "no attempt is counted"


def test_a_start_waits_for_a_live_owner_however_long_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "owner.json", {"incarnation": 1})
    write_json(tmp_path / "heartbeat.json", elsewhere())
    runs_until = 10 * SILENT_SECONDS

    def beat(now: float) -> None:
        write_json(tmp_path / "heartbeat.json", elsewhere(beat=int(now), ended=now >= runs_until))

    clock = Clock(beat)
    monkeypatch.setattr(ownership, "time", clock)
    owned = take_run(tmp_path, alone(), "wait")
    assert owned is not None
    owned.close()
    assert (owned.attempt, clock.now >= runs_until) == (2, True)


def test_a_job_follows_its_own_earlier_start_at_once_and_no_other_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not ownership._may_be_alive(elsewhere(slurm_job_id="7", slurm_restart_count=0))
    assert ownership._may_be_alive(elsewhere(slurm_job_id="7", slurm_restart_count=1))
    assert ownership._may_be_alive(elsewhere(slurm_job_id="8", slurm_restart_count=0))
    assert ownership._may_be_alive(elsewhere(slurm_job_id=None, slurm_restart_count=0))
    assert not ownership._may_be_alive(elsewhere(slurm_job_id="8", ended=True))


@pytest.mark.slow
def test_a_requeued_job_takes_nothing_over(
    tmp_path: Path, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = other("take_over", SLURM_JOB_ID="7")
    assert first.line() == "owns 1"
    second = other("take_over", SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    assert "SLURM job 7) is alive" in second.error()
    third = other("take_over", SLURM_JOB_ID="9")
    assert third.line() == "owns 2"
    assert first.process.wait(600) == 0
    again = other("take_over", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "SLURM job 9) is alive" in again.error()


@pytest.mark.slow
def test_starts_of_the_same_moment_have_one_owner(tmp_path: Path, other: Callable[..., Other]) -> None:
    starts = [other() for _ in range(4)]
    wait_until(lambda: sum(start.process.poll() is None for start in starts) == 1, 120)
    time.sleep(3 * HEARTBEAT_SECONDS)
    (alive,) = [start for start in starts if start.process.poll() is None]
    assert alive.line() == f"owns {owner_of(tmp_path)}"


def test_a_start_between_another_ones_look_and_its_claim_makes_it_the_later_one_or_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "0001.claim").touch()
    with monkeypatch.context() as patch:
        patch.setattr(ownership, "_newest_attempt", lambda run_dir: 0)  # what was seen before that claim came
        assert take_ownership(tmp_path, alone()) == 2
    write_owner = ownership._write_owner

    def overtaken(run_dir: Path, attempt: int) -> None:
        write_owner(run_dir, attempt)
        (run_dir / "starts" / f"{attempt + 1:04d}.claim").touch()

    monkeypatch.setattr(ownership, "_write_owner", overtaken)
    with pytest.raises(UserError, match="another start has begun at the same moment, and is the later one"):
        take_ownership(tmp_path, alone())


def test_numbers_grow_where_owner_json_is_lost_or_set_back(tmp_path: Path) -> None:
    assert [take_ownership(tmp_path, alone()) for _ in range(2)] == [1, 2]
    (tmp_path / "owner.json").unlink()
    assert take_ownership(tmp_path, alone()) == 3
    write_json(tmp_path / "owner.json", {"incarnation": 1})
    assert take_ownership(tmp_path, alone()) == 4
    write_json(tmp_path / "starts" / "0009.json", {})  # a run of an older version, without claims
    assert take_ownership(tmp_path, alone()) == 10


def test_an_owner_mends_owner_json(tmp_path: Path) -> None:
    owned = take_run(tmp_path, alone())
    assert owned is not None
    (tmp_path / "owner.json").unlink()
    wait_until(lambda: owner_of(tmp_path) == 1, 60)
    owned.close()


@pytest.mark.parametrize("text", ['{"incarnation": "1"}', '{"incarnation": -1}', "[]", '{"incarnation": true}', "{}", "x"])
@pytest.mark.parametrize("name", ["owner.json", "heartbeat.json"])
def test_a_damaged_file_is_one_line_that_names_it(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        take_run(tmp_path, alone())
    assert str(tmp_path / name) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def is_told(world: World, run_dir: Path) -> tuple[str, str, list[str]]:
    """Rank 0 cannot read or write, is refused, loses the run: every rank hears it."""
    failures = []
    for blocked in (run_dir / "heartbeat.json", run_dir / "starts"):
        if world.rank == 0:
            (blocked if blocked.suffix else run_dir).mkdir(parents=True, exist_ok=True)  # a folder in the place of a file
            if not blocked.suffix:
                blocked.touch()  # and a file in that of a folder
        world.barrier()
        with pytest.raises(Failure) as failed:
            take_run(run_dir, world)
        failures.append(str(failed.value))
        if world.rank == 0:
            blocked.rmdir() if blocked.is_dir() else blocked.unlink()
    (run_dir / "owner.json").parent.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        (run_dir / "owner.json").write_text("damaged")
    world.barrier()
    with pytest.raises(UserError) as refused:
        take_run(run_dir, world)
    if world.rank == 0:
        (run_dir / "owner.json").unlink()
    world.barrier()
    owned = take_run(run_dir, world)
    assert isinstance(owned, Ownership)
    owned.refuse_if_lost()
    if world.rank == 0:
        take_ownership(run_dir, alone())
        wait_until(lambda: bool(world.stop.signal_name), 60)
    with pytest.raises(UserError) as lost:
        owned.refuse_if_lost()
    owned.close()
    return str(refused.value), str(lost.value), failures


@pytest.mark.slow
def test_every_rank_hears_what_rank_0_finds(tmp_path: Path) -> None:
    for refused, lost, failures in run_ranks(is_told, 2, tmp_path / "ranks", tmp_path / "run"):
        assert [str(tmp_path / "run" / name) in text for name, text in zip(("heartbeat.json", "starts"), failures, strict=True)]
        assert "owner.json: not valid JSON" in refused
        assert "a later start has taken this run over; attempt 1 ends" in lost
