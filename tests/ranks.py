"""Run a function on several ranks of a real gloo process group, each in its own fresh process."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout_seconds: float = 400
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
    for process in processes:
        process.join(timeout_seconds)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    results = []
    for rank in range(size):
        path = folder / f"result{rank}"
        assert path.is_file(), (
            f"rank {rank} of {size} left no result ({'hung' if hung else f'exit {processes[rank].exitcode}'})"
        )
        ok, value = pickle.loads(path.read_bytes())
        path.unlink()
        assert ok, f"rank {rank} of {size}:\n{value}"
        results.append(value)
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

    from megagpt.world import close_world, init_world

    torch.set_num_threads(1)
    try:
        value = (True, function(init_world(timeout_seconds=300), *arguments))
        close_world()
    except BaseException:
        value = (False, traceback.format_exc())
    result.write_bytes(pickle.dumps(value))
