"""Several programs on the same cores, turn about: each runs for a slice of time while the others are stopped.

Whatever the machine does meanwhile (clocks, neighbours) then falls on all of them alike, so that CPU times of
their steps can be compared within a few per cent even on shared cores, which runs one after another do not allow.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SLICE_S = 2.0
"""Longer than a step, so that little of a slice goes to filling caches again."""


@dataclass(frozen=True)
class Contender:
    """One program: `command` is run once per rank, with the ranks' variables and `environment` added to ours."""

    name: str
    command: Sequence[str]
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one program did."""

    start_wall_s: float
    """From its start to the end of its first update, alone on the cores."""
    start_cpu_s: float
    """CPU time of that, over its ranks."""
    ranks: tuple[dict[str, Any], ...]
    """What each rank wrote (see clock.Clock)."""

    def step_cpu_s(self) -> list[float]:
        """CPU seconds of each step but the first, over all ranks."""
        ends = [rank["step_ends_cpu_s"] for rank in self.ranks]
        return [sum(e[i] - e[i - 1] for e in ends) for i in range(1, len(ends[0]))]


class ContenderFailedError(Exception):
    """A program ended with an error or took too long; the message has its last lines."""


def run_turn_about(
    contenders: Sequence[Contender], folder: Path, *, timeout_s: float = 900.0
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Start each program alone up to its first update, then let them take turns until all have ended.

    Returns the outcomes, and why the others have none: a failure, or more than `timeout_s` of its own turns.
    """
    running: list[_Running] = []
    failures: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped programs do not outlive us
    try:
        for contender in contenders:
            program = _Running(contender, folder / contender.name)
            running.append(program)
            try:
                program.wait_until_ready(timeout_s)
                program.send(signal.SIGSTOP)
            except ContenderFailedError as error:
                failures[contender.name] = str(error)
        alive = [program for program in running if program.contender.name not in failures]
        while alive:
            for program in list(alive):
                try:
                    if program.take_turn(timeout_s):
                        alive.remove(program)
                except ContenderFailedError as error:
                    failures[program.contender.name] = str(error)
                    alive.remove(program)
        good = [program for program in running if program.contender.name not in failures]
        return {program.contender.name: program.outcome() for program in good}, failures
    finally:
        for program in running:
            program.kill()
        signal.signal(signal.SIGTERM, before)


class _Running:
    def __init__(self, contender: Contender, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.contender, self.folder = contender, folder
        self.started, self.used_s = time.time(), 0.0
        port = _free_port()
        self.processes = []
        for rank in range(contender.ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(contender.ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(contender.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "BENCH_READY": str(folder / f"ready_{rank}.json"),
                "BENCH_OUT": str(folder / f"out_{rank}.json"),
                **contender.environment,
            }
            for name in ("BENCH_READY", "BENCH_OUT"):
                Path(environment[name]).unlink(missing_ok=True)
            with (folder / f"log_{rank}.txt").open("w") as log:
                process = subprocess.Popen(
                    contender.command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
                )
            self.processes.append(process)

    def wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(self._ready(rank).exists() for rank in range(self.contender.ranks)):
            if self.ended():
                self.check()
                return
            if time.monotonic() > deadline:
                raise ContenderFailedError(f"{self.contender.name}: no update in {timeout_s:.0f} s\n{self.tail()}")
            time.sleep(0.005)

    def take_turn(self, timeout_s: float) -> bool:
        """Run for a slice; True if it has ended well. Raises ContenderFailedError."""
        self.send(signal.SIGCONT)
        began = time.monotonic()
        while time.monotonic() < began + SLICE_S and not self.ended():
            time.sleep(0.02)
        self.used_s += time.monotonic() - began
        if self.ended():
            self.check()
            return True
        if self.used_s > timeout_s:
            raise ContenderFailedError(f"{self.contender.name}: not done in {timeout_s:.0f} s of its own\n{self.tail()}")
        self.send(signal.SIGSTOP)
        return False

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def ended(self) -> bool:
        statuses = [process.poll() for process in self.processes]
        return all(status is not None for status in statuses) or any(statuses)

    def check(self) -> None:
        for process in self.processes:
            try:
                status = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                status = None
            if status != 0:
                raise ContenderFailedError(f"{shlex.join(self.contender.command)}: exit status {status}\n{self.tail()}")

    def tail(self) -> str:
        logs = [self.folder / f"log_{rank}.txt" for rank in range(self.contender.ranks)]
        return "\n".join(log.read_text(encoding="utf-8", errors="replace")[-3000:] for log in logs)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def outcome(self) -> Outcome:
        ranks = range(self.contender.ranks)
        ready = [json.loads(self._ready(rank).read_text(encoding="utf-8")) for rank in ranks]
        outputs = [json.loads((self.folder / f"out_{rank}.json").read_text(encoding="utf-8")) for rank in ranks]
        wall = max(entry["at"] for entry in ready) - self.started
        return Outcome(wall, sum(entry["cpu_s"] for entry in ready), tuple(outputs))

    def _ready(self, rank: int) -> Path:
        return self.folder / f"ready_{rank}.json"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
