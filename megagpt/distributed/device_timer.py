"""How long parts of a step take on the device, for the comparison of ranks (megagpt.watchdog.stragglers)."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class DeviceTimer:
    """Seconds between the begin and the end of a `with` block: on a GPU by events, read once they have passed, so nothing
    waits. They count the device's time, not the host's."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        """Blocks that have been measured."""
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] | None = [] if device.type == "cuda" else None
        self._passed: list[tuple[Any, Any]] = []  # to be used again

    @property
    def seconds(self) -> float:
        """Of all blocks whose end has passed."""
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            self._seconds += first.elapsed_time(last) / 1000
            self.count += 1
            self._passed.append((first, last))
        return self._seconds

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self._events is None:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            self.count += 1
            return
        _ = self.seconds
        if self._passed:
            first, last = self._passed.pop()
        else:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))
