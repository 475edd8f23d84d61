"""A limit on the CPU time of one piece of work, in any thread. It counts CPU time, so a loaded machine does not reach it
sooner."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.corpus.runner import hard_limit


class CpuLimitExceededError(Exception):
    """The work used more CPU time than its limit."""


@dataclass
class _Watched:
    """The thread at work now, its clock, and the reading of that clock at which it is stopped (None: idle)."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    deadlines: dict[int, float] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    watcher: threading.Thread | None = None
    end: threading.Event = field(default_factory=threading.Event)


_WATCHED = _Watched()
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def cpu_limit(seconds: float, name: str | None = None) -> Iterator[None]:
    """Raise CpuLimitExceededError in the body once its thread has used `seconds` of CPU time. Does not nest.

    Python code is interrupted. A long call into C is not: in a worker the kernel then ends the process, and the exception
    is raised here, before the body, when the block is read again (hard_limit.py). So both ways give the same result. `name`
    tells what the work is on, where the order of work is not the same at every start.
    """
    if not hard_limit.enter(seconds, name):
        raise CpuLimitExceededError(f"more than {seconds:g} s of CPU time")
    try:
        with _interrupted(seconds):
            yield
    finally:
        hard_limit.leave()


@contextlib.contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    thread = threading.get_ident()
    with _WATCHED.lock:
        _WATCHED.fired.discard(thread)  # left there if the exception came between the end of a body and the lock below
        _WATCHED.deadlines[thread] = time.thread_time() + seconds
        if _WATCHED.watcher is None or not _WATCHED.watcher.is_alive():
            _WATCHED.end = threading.Event()
            _WATCHED.watcher = threading.Thread(target=_watch, args=(_WATCHED.end,), daemon=True, name="cpu-limit")
            _WATCHED.watcher.start()
    try:
        yield
    finally:
        with _WATCHED.lock:
            _WATCHED.deadlines.pop(thread, None)
            fired = thread in _WATCHED.fired
            _WATCHED.fired.discard(thread)
        if fired:  # the exception is on its way, or was what ended the body: let it arrive here, not later
            with contextlib.suppress(CpuLimitExceededError):
                _interrupt(thread)
                time.sleep(0)  # a call at whose end it arrives
            raise CpuLimitExceededError(f"more than {seconds:g} s of CPU time")


def _interrupt(thread: int) -> None:
    """Let the exception arrive in the thread, in the place of one that is on its way.

    None, which takes one back, must not be given: it leaves the interpreter's flag up that something is pending, and Python
    3.11 looks at it for ever when a function is entered under a tracer.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(CpuLimitExceededError))


def end_watcher() -> None:
    """End the thread that watches, if there is one: a process with one thread can be forked. The next limit starts it again."""
    with _WATCHED.lock:
        watcher, end, _WATCHED.watcher = _WATCHED.watcher, _WATCHED.end, None
    if watcher is not None:
        end.set()
        watcher.join()
        until = time.monotonic() + 1.0
        while time.monotonic() < until and Path(f"/proc/self/task/{watcher.native_id}").exists():
            time.sleep(0.001)  # the system's thread ends a little later than Python's


def _watch(end: threading.Event) -> None:
    while not end.wait(_POLL_SECONDS):
        with _WATCHED.lock:
            for thread, deadline in list(_WATCHED.deadlines.items()):
                if thread not in _WATCHED.fired and time.clock_gettime(time.pthread_getcpuclockid(thread)) > deadline:
                    _WATCHED.fired.add(thread)
                    _interrupt(thread)
