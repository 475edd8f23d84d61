"""Tasks on worker processes: a pool on this machine, Dask workers on several (concurrent.futures executors), or inline."""

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from megagpt.corpus.runner import cpu_limit
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.supervised import ChildDiedError, die_with_parent, supervise

K = TypeVar("K")


class WorkerDiedError(Exception):
    """A worker process was killed (out of memory, a crash in a library). Committed files are whole."""


def run_tasks(
    tasks: Iterable[tuple[K, Callable[..., Any], tuple[Any, ...]]],
    execution: Execution,
    consume: Callable[[K, Any], None],
    describe: Callable[[K], str] = str,
) -> None:
    """Run (key, function, arguments) tasks on workers and hand `consume` each (key, result) as it comes, few in flight.

    Each worker runs them in a child process, which is ended and replaced when a record is over its CPU limit (supervised.py).
    Functions and arguments must pickle. The first error cancels the tasks not yet started and is raised; WorkerDiedError names
    the tasks in flight (by `describe`) when a worker process was killed. executor=inline runs the tasks here, in their order.
    """
    if execution.executor == "inline":
        for key, function, arguments in tasks:
            consume(key, function(*arguments))
        return
    with _executor(execution) as (executor, width):
        flying: dict[Future[Any], K] = {}
        try:
            for key, function, arguments in tasks:
                flying[executor.submit(supervise, function, arguments, fork=execution.executor == "process")] = key
                if len(flying) > width:
                    _collect(flying, consume)
            while flying:
                _collect(flying, consume)
        except (BrokenProcessPool, ChildDiedError):
            names = sorted(describe(key) for key in flying.values())
            raise WorkerDiedError(
                "a worker process was killed (out of memory, or a crash in a library); it was at work on one of these:\n  "
                + "\n  ".join(names)
                + "\neverything else is committed; the same command resumes from it"
            ) from None
        finally:
            for future in flying:
                future.cancel()


def _collect(flying: dict[Future[Any], K], consume: Callable[[K, Any], None]) -> None:
    done, _ = wait(flying, return_when=FIRST_COMPLETED)
    for future in done:
        result = future.result()
        consume(flying.pop(future), result)


@contextlib.contextmanager
def _executor(execution: Execution) -> Iterator[tuple[Executor, int]]:
    """An executor and how many tasks keep it busy."""
    if execution.executor == "process":
        cpu_limit.end_watcher()  # phases that ran in this process may have left it
        context = multiprocessing.get_context("fork" if _num_threads() == 1 else "spawn")
        with ProcessPoolExecutor(execution.num_workers, mp_context=context, initializer=_begin_worker) as pool:
            yield pool, execution.num_workers
        return
    import distributed

    with distributed.Client(scheduler_file=str(execution.scheduler_file)) as client:
        with client.get_executor(pure=False, retries=2) as executor:
            yield (
                executor,
                2 * max(1, sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())),
            )


def _num_threads() -> int:
    """Threads of this process, those of libraries too (0: unknown). A process with one can be forked: its workers then start at
    once, with all that is imported here. Locks that other threads hold in the moment of a fork would never be released."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _begin_worker() -> None:
    """End this worker when its parent is gone: a pool's workers otherwise outlive a parent that was killed. The kernel does it
    on Linux; a thread elsewhere, and where the parent was gone before. Only warnings of libraries are shown."""
    logging.getLogger().setLevel(logging.WARNING)
    die_with_parent()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
