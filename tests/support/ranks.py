"""Run a function on several ranks of a real gloo process group, each in its own fresh process."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.distributed.ports import free_ports


def own_ports(count: int) -> list[int]:
    """Free ports that no other worker of pytest-xdist chooses between now and when they are bound."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return free_ports(count, part=worker, parts=int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def free_port() -> int:
    """One of own_ports."""
    return own_ports(1)[0]


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout_seconds: float = 900
) -> list[Any]:
    """`function(world, *arguments)` on ranks 0 .. size-1; returns their results in rank order.

    The function must be importable from a test module. Raises AssertionError with the traceback of the first rank that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, size, port, folder / f"result{rank}", arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 5)  # the others wait for it in vain
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    results, failures = [], []
    for rank, process in enumerate(processes):
        path = folder / f"result{rank}"
        state = "hung" if process in hung else f"exit {process.exitcode}"
        ok, value = pickle.loads(path.read_bytes()) if path.is_file() else (False, f"no result ({state})")
        path.unlink(missing_ok=True)
        results.append(value)
        failures += [] if ok else [f"rank {rank} of {size}: {value}"]
    assert not failures, "\n".join(failures)
    return results


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, result: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    from megagpt.distributed.world import close_world, init_world

    torch.set_num_threads(1)
    try:
        value = (True, function(init_world(timeout_seconds=300), *arguments))
        close_world()
    except BaseException:
        value = (False, traceback.format_exc())
    result.write_bytes(pickle.dumps(value))
    if not value[0]:
        os._exit(1)


class Ranks:
    """A tool on several ranks as separate processes, started as a launcher would."""

    def __init__(self, command: list[str], size: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            places = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            environment = {**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            with log.open("ab") as output:
                process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
            self.processes.append(process)

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to some ranks, or all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].send_signal(number)

    def wait(self, timeout_seconds: float = 900) -> list[int]:
        """Exit statuses; what still runs after the time is killed, and that is a failure."""
        end = time.monotonic() + timeout_seconds
        try:
            return [process.wait(max(1.0, end - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return self.logs[rank].read_text(errors="replace")


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 900) -> None:
    """Poll until the condition holds; AssertionError if it never does."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.02)
