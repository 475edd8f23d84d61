"""Measure how long the forward passes of a rank take, to compare ranks (stragglers.py)."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class ForwardTimer:
    """Seconds in forward passes, measured with events on a GPU; they are read after they have passed, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._events: list[tuple[Any, Any]] | None = [] if device.type == "cuda" else None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self._events is None:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began
            return
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            self.seconds += first.elapsed_time(last) / 1000
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))
