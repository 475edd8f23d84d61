"""Show what the threads of this process do now: their Python stacks, their system calls, and why there is no progress.

It works from a thread of the same process while others are stuck, as long as none of them holds the interpreter's lock.
"""

import linecache
import os
import platform
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

MAX_FRAMES = 40

_FILE_CALLS = {
    0: "read", 1: "write", 2: "open", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 16: "ioctl", 17: "pread", 18: "pwrite",
    19: "readv", 20: "writev", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
    78: "getdents", 82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 217: "getdents", 257: "openat", 262: "stat",
    263: "unlink", 264: "rename", 285: "fallocate", 295: "preadv", 296: "pwritev", 316: "rename", 332: "statx",
}  # fmt: skip
"""System calls of Linux on x86-64 that wait for a file system, by number."""
_OTHER_CALLS = {
    7: "poll",
    23: "select",
    35: "sleep",
    45: "recv",
    47: "recv",
    202: "futex",
    230: "sleep",
    232: "epoll",
    271: "poll",
}
_BY_DESCRIPTOR = {0, 1, 5, 8, 16, 17, 18, 19, 20, 72, 73, 74, 75, 77, 78, 217, 285, 295, 296}
_COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/")
_FETCH_FILE = "/megagpt/distributed/fetch.py"
"""Where a step waits for its device, which may itself wait for the other ranks' part of a collective."""
_THEIR_FILES = "/deepspeed/runtime/"
_THEIR_FETCH = re.compile(r"\.item\(\)|\.tolist\(\)|\.cpu\(\)|\b(?:float|bool|int)\(")
"""DeepSpeed's own step does so too."""
_INNERMOST = 4
"""Innermost frames in which a collective is searched."""
_LOCK_WORDS = re.compile(
    r"\bwith\b.{0,200}?(lock|mutex|semaphore|condition)\w*\b|\.(acquire|wait|join|result)\(", re.IGNORECASE
)
_OWN_THREADS = ("watchdog", "stop signals")


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread: its name, its stack (`file:line function: source`, innermost frame last), and its current system call."""

    name: str
    stack: tuple[str, ...]
    call: str
    """`read /path`, `futex`, `running` …; "" if the system does not show it."""


def threads() -> list[Thread]:
    """All Python threads of this process, the main thread first, without the watchdog's and the signal handler's threads."""
    frames = sys._current_frames()
    main = threading.main_thread()
    known = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    return [
        Thread(thread.name, format_stack(frames[thread.ident]), system_call(thread.native_id))
        for thread in known
        if thread.ident in frames and not thread.name.startswith(_OWN_THREADS)
    ]


def format_stack(frame: FrameType | None) -> tuple[str, ...]:
    """`file:line function: source line` of the innermost MAX_FRAMES frames, innermost last."""
    lines: list[str] = []
    while frame is not None and len(lines) < MAX_FRAMES:
        code = frame.f_code
        source = linecache.getline(code.co_filename, frame.f_lineno).strip()
        lines.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}: {source}")
        frame = frame.f_back
    return tuple(reversed(lines))


def system_call(thread_id: int | None) -> str:
    """The system call in which a thread of this process waits, with the file's path if it has one."""
    task = Path(f"/proc/self/task/{thread_id}")
    try:
        words = (task / "syscall").read_text().split()
        number = int(words[0]) if words and words[0].lstrip("-").isdigit() else -1
        if number < 0:
            return words[0] if words else ""
        if platform.machine() != "x86_64":
            return f"call {number}"
        if number in _BY_DESCRIPTOR:
            return f"{_FILE_CALLS[number]} {os.readlink(f'/proc/self/fd/{int(words[1], 16)}')}"
        return _FILE_CALLS.get(number) or _OTHER_CALLS.get(number, f"call {number}")
    except (OSError, ValueError):
        return ""


def culprit(found: Sequence[Thread], activity: str) -> Thread:
    """The thread that the main one waits for: the loader's in a data wait, a worker's if its result is awaited, else itself."""
    main = found[0]
    if not main.stack or _kind(main) != "lock":
        return main
    workers = [t for t in found[1:] if t.stack and not _idle(t)]
    loaders = [t for t in found[1:] if t.name.startswith("loader")]
    if activity == "data_wait" and loaders:
        return next((t for t in workers if t in loaders), loaders[0])
    awaits_worker = any("concurrent/futures" in line or "queue.py" in line for line in main.stack[-3:])
    return next((t for t in workers if any("/megagpt/" in line for line in t.stack)), main) if awaits_worker else main


def explain(found: Sequence[Thread], activity: str) -> tuple[str, str]:
    """(cause, what) of a process without progress. cause is one of loader, file system, lock, collective, device, code."""
    thread = culprit(found, activity)
    kind = _kind(thread)
    where = own_line(thread.stack)
    call = f", in {thread.call}" if thread.call and thread.call not in ("running", "futex") else ""
    if _is_file_call(thread.call):
        kind = "file system"
    elif activity == "data_wait":
        kind = "loader"
        if _idle(thread):
            return kind, f"the batch never comes: thread {thread.name} is idle or has ended; it waits at {where}"
    return kind, f"thread {thread.name} at {where}{call}"


def waits_for_others(found: Sequence[Thread]) -> bool:
    """Whether the main thread is in a collective or fetches from the device, where it can only wait."""
    return bool(found) and _kind(found[0]) in ("collective", "device")


def in_collective(frame: FrameType | None) -> bool:
    """Whether a thread is inside torch's or DeepSpeed's collectives; frame: its innermost frame."""
    for _ in range(_INNERMOST):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in _COLLECTIVE_FILES):
            return True
        frame = frame.f_back
    return False


def own_line(stack: Sequence[str]) -> str:
    """The innermost frame, after the innermost frame of this library if that is a different one."""
    if not stack:
        return "no Python frame"
    ours = next((line for line in reversed(stack) if "/megagpt/" in line), "")
    return stack[-1] if not ours or ours == stack[-1] else f"{ours} -> {stack[-1]}"


def as_json(found: Sequence[Thread]) -> list[dict[str, Any]]:
    """The threads as JSON values, for the verdict's file."""
    return [asdict(thread) for thread in found]


def _kind(thread: Thread) -> str:
    if any(part in line for line in thread.stack[-_INNERMOST:] for part in _COLLECTIVE_FILES):
        return "collective"
    last = thread.stack[-1] if thread.stack else ""
    if _THEIR_FILES in last and _THEIR_FETCH.search(last):
        return "device"
    if _FETCH_FILE in "".join(thread.stack[-2:]):  # torch's own frame may be the innermost: Event.synchronize
        return "device"
    if "_engine_run_backward" in last and thread.call in ("", "futex"):
        return "collective"
    if _is_file_call(thread.call):
        return "file system"
    if "/threading.py:" in last or "/concurrent/futures/" in last or _LOCK_WORDS.search(last):
        return "lock"
    return "code"


def _idle(thread: Thread) -> bool:
    return any("concurrent/futures/thread.py" in line and "work_queue.get" in line for line in thread.stack[-2:])


def _is_file_call(call: str) -> bool:
    name, _, path = call.partition(" ")
    return name in _FILE_CALLS.values() and not path.startswith(("socket:", "anon_inode:", "/dev/nvidia"))
