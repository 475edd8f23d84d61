"""A limit on the CPU time of one record that holds inside C too: the kernel ends the process, and the record is known.

A worker's child process works under `begin`: memory that it shares with its supervisor holds the number of the record it is at.
Work on a record goes between `enter` and `leave`, which start and stop a timer of the process's CPU time. When the timer ends,
the kernel ends the process (SIGPROF, whatever C code runs). The supervisor then starts the task again and names the records
that were too slow: for these `enter` returns False. Records are numbered in the order of work, which is the same at every
start, or by a hash of their name where it is not.
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

GRACE_SECONDS = 1.0
"""CPU time beyond the limit for Python code to end by an exception, which costs no new start of the block."""


@dataclass
class _Task:
    """The task at work in this process: shared memory for the record's number (None: no supervisor), and what to skip."""

    place: memoryview | None = None
    too_slow: frozenset[int] = frozenset()
    record: int = 0


_TASK = _Task()


@contextlib.contextmanager
def begin(place: memoryview, too_slow: frozenset[int]) -> Iterator[None]:
    """In the child of a supervisor: hold the limits of one task. `place` is shared memory of 8 bytes."""
    _TASK.place, _TASK.too_slow, _TASK.record = place, too_slow, 0
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _TASK.place, _TASK.too_slow = None, frozenset()


def enter(seconds: float, name: str | None = None) -> bool:
    """Start work on a record, the next one or that of a name. False: it was too slow before. No supervisor, no hard limit."""
    if _TASK.place is None:
        return True
    if name is None:
        _TASK.record += 1
    number = _TASK.record if name is None else xxhash.xxh3_64_intdigest(name.encode("utf-8", "replace"))
    if number in _TASK.too_slow:
        return False
    _TASK.place[:8] = number.to_bytes(8, "little")
    signal.setitimer(signal.ITIMER_PROF, seconds + GRACE_SECONDS)
    return True


def leave() -> None:
    """End work on a record."""
    if _TASK.place is not None:
        signal.setitimer(signal.ITIMER_PROF, 0)
