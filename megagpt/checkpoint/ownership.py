"""Who owns a run directory: its newest attempt. A start first checks whether an earlier one is alive; that one keeps the run.

    starts/<attempt>.claim  created exclusively: two starts never get the same number
    owner.json              the attempt that owns the run; a checkpoint is only committed by the attempt that it names
    heartbeat.json          written by rank 0 of the owner every few seconds: a growing number, host, process, job

An owner is alive if its heartbeat changes while the new start watches it, by that start's own clock. It counts as dead at once
if its heartbeat says that it has ended, if its process is gone from this machine, or if it is an earlier start of the same
SLURM job, which SLURM has ended (owner.json fences off what may be left of it on a lost node). An owner that finds a later
attempt in owner.json asks its ranks to stop; they end with status 2, which no job script starts again."""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megagpt.config import UserError
from megagpt.distributed.world import Stopped, World, utc_now
from megagpt.files import process_begun, read_json, write_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
"""An owner whose heartbeat has not changed for this long is dead: a disk or the interpreter may delay it by some seconds."""

IfRunning: TypeAlias = Literal["refuse", "wait", "take_over"]


class Ownership:
    """One attempt's ownership of a run. On rank 0 a thread writes the heartbeat and checks for a later attempt."""

    def __init__(self, run_dir: Path, world: World, attempt: int) -> None:
        """All ranks create it; only rank 0 does anything until `refuse_if_lost`."""
        self.run_dir, self.attempt, self._world = run_dir, attempt, world
        self._lost, self._closing, self._beats = threading.Event(), threading.Event(), 0
        self._thread: threading.Thread | None = None
        if world.rank == 0:
            self._beat()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def refuse_if_lost(self) -> None:
        """Raise UserError on every rank if a later attempt has taken the run; all ranks call it together."""
        if self._world.any(self._lost.is_set()):
            raise UserError(f"{self.run_dir}: a later start has taken this run over; attempt {self.attempt} ends")

    def close(self) -> None:
        """Record that this attempt has ended. Safe to call twice."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
            if not self._lost.is_set():
                self._beat(ended=True)

    def _run(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            try:
                owner = owner_of(self.run_dir)
            except (UserError, OSError):  # torn while it is written, or a disk that is away: the next look tells
                continue
            if owner < self.attempt:  # lost, or overwritten by a start of the same moment, which ends by itself
                with contextlib.suppress(OSError):
                    _write_owner(self.run_dir, self.attempt)
            if owner > self.attempt:
                log.warning("%s: attempt %d has taken this run over: attempt %d ends", self.run_dir, owner, self.attempt)
                self._lost.set()
                self._world.stop.request("a later start that has taken the run over")
                return
            self._beat()

    def _beat(self, *, ended: bool = False) -> None:
        self._beats += 1
        value = {"incarnation": self.attempt, "beat": self._beats, "ended": ended, "seconds": HEARTBEAT_SECONDS, **_myself()}
        path = self.run_dir / "heartbeat.json"
        temporary = path.with_name(f".tmp-heartbeat-{self.attempt}.json")
        with contextlib.suppress(OSError):  # a full disk ends no training; the saves will say it
            temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")  # no fsync: it need not survive a crash
            os.replace(temporary, path)


def take_run(run_dir: Path, world: World, if_running: IfRunning = "refuse") -> Ownership | None:
    """Take ownership of a run directory unless a live start has it; all ranks call it together. None: a stop signal came first.

    if_running: what to do about an owner that is alive. Raises UserError on every rank if it is refused, Failure on every rank
    if rank 0 cannot read or write there.
    """
    if if_running == "take_over" and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        if_running = "refuse"  # two jobs that are requeued in turn would take the run from each other for ever
    deadline = time.monotonic() + SILENT_SECONDS
    earlier: dict[str, Any] | None = None
    said = False
    while True:
        refusal = None
        try:
            found = world.together(lambda: _heartbeat(run_dir) if world.rank == 0 else None)
        except Stopped:
            return None
        done = not _may_be_alive(found)
        alive = not done and earlier is not None and found is not None and _moved(earlier, found)
        if found is None or earlier is None or alive or done or found["incarnation"] != earlier["incarnation"]:
            deadline = time.monotonic() + SILENT_SECONDS
        silent = time.monotonic() > deadline
        if alive and if_running == "refuse":
            refusal = (
                f"run_dir={run_dir}: {_named(found)} is alive: end it first, or take the run from it with if_running=take_over"
            )
        earlier = found
        take = done or silent or (alive and if_running == "take_over")
        refusal, take = world.broadcast((refusal, take))
        if refusal:
            raise UserError(refusal)
        if world.any(bool(world.stop.signal_name)):
            return None
        if take:
            try:
                return Ownership(run_dir, world, take_ownership(run_dir, world))
            except Stopped:
                return None
        if not said and world.rank == 0:
            log.info("%s: checking whether %s is alive (at most %.0f s)", run_dir, _named(found), SILENT_SECONDS)
        said = True
        time.sleep(HEARTBEAT_SECONDS / 4)


def take_ownership(run_dir: Path, world: World) -> int:
    """Take ownership of a run directory at once, from any owner; returns the number of the new attempt on every rank.

    Removes unfinished saves of earlier attempts. Raises UserError on every rank if owner.json is damaged, Failure if rank 0
    cannot read or write there, Stopped after a stop request.
    """
    return world.broadcast(world.together(lambda: _claim(run_dir) if world.rank == 0 else 0))


def _claim(run_dir: Path) -> int:
    attempt = _next_attempt(run_dir)
    _write_owner(run_dir, attempt)
    if _newest_attempt(run_dir) > attempt:
        raise UserError(f"run_dir={run_dir}: another start has begun at the same moment, and is the later one")
    _clear_unfinished(run_dir / "checkpoints")
    return attempt


def still_owner(run_dir: Path, attempt: int) -> bool:
    """Whether no later start has taken the run directory."""
    return owner_of(run_dir) == attempt


def owner_of(run_dir: Path) -> int:
    """The attempt that owns a run; 0 = none yet. Raises UserError if owner.json is not JSON or names none."""
    path = run_dir / "owner.json"
    if not path.exists():
        return 0
    return _read_attempt(path)["incarnation"]


def _read_attempt(path: Path) -> dict[str, Any]:
    value = read_json(path)
    attempt = value.get("incarnation") if isinstance(value, dict) else None
    if not isinstance(attempt, int) or isinstance(attempt, bool) or attempt < 0:
        raise UserError(f"{path}: incarnation={attempt!r}: a whole number from 0 is expected")
    return value


def _next_attempt(run_dir: Path) -> int:
    """A number above all earlier ones, also if owner.json was lost or set back."""
    (run_dir / "starts").mkdir(parents=True, exist_ok=True)
    attempt = max(owner_of(run_dir), _newest_attempt(run_dir))
    while True:
        attempt += 1
        try:
            (run_dir / "starts" / f"{attempt:04d}.claim").touch(exist_ok=False)
        except FileExistsError:  # another start, at the same moment
            continue
        return attempt


def _newest_attempt(run_dir: Path) -> int:
    """The highest number of a start that has left a claim or, in older versions, only a record."""
    names = [path.stem for path in (run_dir / "starts").iterdir() if path.suffix in (".claim", ".json")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _write_owner(run_dir: Path, attempt: int) -> None:
    value = {"incarnation": attempt, "host": os.uname().nodename, "pid": os.getpid(), "started": utc_now()}
    write_json(run_dir / "owner.json", value)


def _clear_unfinished(checkpoints: Path) -> None:
    for leftover in checkpoints.glob("tmp_*"):
        _, _, name = leftover.name.partition("_old_")
        if name and not leftover.with_name(name).exists():  # it ended between the two renames of a checkpoint's replacement
            leftover.rename(leftover.with_name(name))
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _heartbeat(run_dir: Path) -> dict[str, Any] | None:
    """The owner's heartbeat; None if there is no owner, or none of a version that has one."""
    path = run_dir / "heartbeat.json"
    if not path.exists():
        return None
    value = _read_attempt(path)
    return value if value["incarnation"] >= owner_of(run_dir) else None


def _may_be_alive(heartbeat: Mapping[str, Any] | None) -> bool:
    """Whether an owner has to be watched, because nothing proves that it has ended."""
    if heartbeat is None or heartbeat.get("ended"):
        return False
    me = _myself()
    if all(me[key] and heartbeat.get(key) == me[key] for key in ("boot_id", "pid_namespace")):
        return process_begun(int(heartbeat["pid"])) == heartbeat.get("begun")
    job, restarts = heartbeat.get("slurm_job_id"), heartbeat.get("slurm_restart_count")
    return job is None or job != me["slurm_job_id"] or int(restarts or 0) >= int(me["slurm_restart_count"])


def _moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return any(before.get(key) != now.get(key) for key in ("incarnation", "beat"))


def _named(heartbeat: Mapping[str, Any] | None) -> str:
    if heartbeat is None:
        return "an attempt"
    job = heartbeat.get("slurm_job_id")
    where = f"host {heartbeat.get('host')}, process {heartbeat.get('pid')}" + (f", SLURM job {job}" if job else "")
    return f"attempt {heartbeat.get('incarnation')} ({where})"


def _myself() -> dict[str, Any]:
    """The identity of this process, by which another one can tell whether it still runs."""
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "begun": process_begun(os.getpid()),
        "boot_id": _or_nothing(lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()),
        "pid_namespace": _or_nothing(lambda: os.readlink("/proc/self/ns/pid")),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _or_nothing(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError:
        return ""
