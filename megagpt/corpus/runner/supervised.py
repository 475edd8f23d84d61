"""Tasks in a child process that may be ended: a worker hands its tasks to one child, and starts another when one is too slow.

How it works. `supervise` runs in a worker of the pool, or of Dask. Its child lives as long as the worker, so that models and
kernels are loaded once. If the kernel ends the child because a record was over its CPU limit (hard_limit.py), the task is
given to a new child that skips that record. A child that dies in another way is a ChildDiedError. A pool's worker forks its
child: it has run nothing but this. A Dask worker has threads, which a fork would leave in the middle of anything: its child
is a new Python. No child outlives its worker, even inside C: the kernel kills it when the thread that started it ends.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from megagpt.corpus.runner import hard_limit

IDLE_SECONDS = 60.0
"""How long the child of a Dask worker waits for its next task."""
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class ChildDiedError(Exception):
    """The process that ran a task was killed (out of memory, a crash in a library)."""


@dataclass(frozen=True, slots=True)
class _Child:
    """A process at work for this thread, its end of the pipe, and the memory in which it keeps the number of its record."""

    pid: int
    connection: Connection
    place: mmap.mmap
    process: subprocess.Popen[bytes] | None
    """None for a fork."""


_OWN = threading.local()
_STARTER = ThreadPoolExecutor(1, "child-starter")
"""Starts the children of a Dask worker: their lives hang on the thread that starts them, and this one lives long."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(function: Callable[..., Any], arguments: tuple[Any, ...], *, fork: bool) -> Any:
    """The result of function(*arguments), from this thread's child. Raises what it raises, or ChildDiedError."""
    too_slow = frozenset[int]()
    while True:
        child = _child(fork=fork)
        child.place[:8] = bytes(8)
        try:
            child.connection.send_bytes(_pickled((function, arguments, too_slow)))
            reply = child.connection.recv_bytes()
        except (EOFError, ConnectionError):
            code = _end(child)
            record = int.from_bytes(child.place[:8], "little")
            if code == -signal.SIGPROF and record and record not in too_slow:
                too_slow |= {record}
                log.warning("record %d of a block was over its CPU limit inside a library: it is left out", record)
                continue
            if code == 0 and not record:  # it had waited too long for a task
                continue
            raise ChildDiedError(f"exit status {code}") from None
        except BaseException:  # a stop request: the child's remaining work is not wanted
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            _end(child)
            raise
        ended_well, value = pickle.loads(reply)
        if ended_well:
            return value
        raise value


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError):
        import cloudpickle  # comes with Dask, which hands over functions that plain pickle cannot

        return cloudpickle.dumps(value)


def _child(*, fork: bool) -> _Child:
    found: _Child | None = getattr(_OWN, "child", None)
    if found is None:
        found = _OWN.child = _forked() if fork else _STARTER.submit(_started).result()
    return found


def _end(child: _Child) -> int:
    """Exit status of a child that has died; the next task starts another."""
    _OWN.child = None
    child.connection.close()
    if child.process:
        return child.process.wait()
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def _forked() -> _Child:
    ours, theirs = Pipe()
    place = mmap.mmap(-1, mmap.PAGESIZE)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        theirs.close()
        return _Child(pid, ours, place, None)
    status = 1
    try:
        die_with_parent()
        if os.getppid() == parent:
            ours.close()
            _serve(theirs, memoryview(place), None)
            status = 0
    finally:
        os._exit(status)  # nothing of the worker is to be cleaned up twice


def _started() -> _Child:
    ours, theirs = Pipe()
    memory = os.memfd_create("megagpt-record")
    os.ftruncate(memory, mmap.PAGESIZE)
    words = [sys.executable, "-c", _START, str(theirs.fileno()), str(memory), str(os.getpid())]
    process = subprocess.Popen(words, pass_fds=(theirs.fileno(), memory))
    theirs.close()
    place = mmap.mmap(memory, mmap.PAGESIZE)
    os.close(memory)
    ours.send(sys.path)
    return _Child(process.pid, ours, place, process)


_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from megagpt.corpus.runner.supervised import serve_worker
serve_worker(connection, int(sys.argv[2]), int(sys.argv[3]))
"""


def serve_worker(connection: Connection, memory: int, parent: int) -> None:
    """What a new Python does as the child of a Dask worker."""
    die_with_parent()
    if os.getppid() == parent:
        logging.getLogger().setLevel(logging.WARNING)
        _serve(connection, memoryview(mmap.mmap(memory, mmap.PAGESIZE)), IDLE_SECONDS)


def _serve(connection: Connection, place: memoryview, idle_seconds: float | None) -> None:
    """Run tasks until the worker closes its end, or none has come for `idle_seconds`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker is interrupted, and ends this
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(EOFError, ConnectionError):
        while idle_seconds is None or connection.poll(idle_seconds):
            task = connection.recv_bytes()
            connection.send_bytes(_run(task, place))


def _run(task: bytes, place: memoryview) -> bytes:
    try:
        function, arguments, too_slow = pickle.loads(task)
        with hard_limit.begin(place, too_slow):
            return pickle.dumps((True, function(*arguments)))
    except BaseException as error:
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        try:
            reply = pickle.dumps((False, error))
            pickle.loads(reply)
        except Exception:  # an exception of a library that cannot be sent
            reply = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        return reply
    finally:
        place[:8] = bytes(8)
