"""Further writers of a run's rows beside metrics.jsonl, each behind a thread of its own: they never stop or slow training."""

import logging
import queue
import threading
import time
from typing import Any, Protocol

log = logging.getLogger(__name__)

MAX_ROWS = 1000
"""Rows that wait for a writer at most; further ones are dropped and counted."""

WARN_SECONDS = 600.0
"""Seconds between two warnings of dropped rows."""


class Writer(Protocol):
    """Where rows go: W&B, TensorBoard, Prometheus. Called by one thread, never by two at once."""

    name: str

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row, as plain JSON values. May raise anything, and may take long."""
        ...

    def close(self) -> None:
        """Send what is still held, and end."""
        ...


class BackgroundWriter:
    """A writer and its thread. A writer that raises gets no further row; one that blocks drops rows, which are counted."""

    def __init__(self, writer: Writer, *, max_rows: int = MAX_ROWS) -> None:
        self.writer = writer
        self.dropped = 0
        self.failed = False
        self._warned = float("-inf")
        self._rows: queue.Queue[tuple[str, int, dict[str, Any]] | None] = queue.Queue(max_rows)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer {writer.name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Hand a row over; never waits."""
        if self.failed:
            return
        name = self.writer.name
        try:
            self._rows.put_nowait((kind, step, values))
        except queue.Full:
            self.dropped += 1
            if time.monotonic() - self._warned > WARN_SECONDS:
                self._warned = time.monotonic()
                log.warning("%s does not keep up: %d rows dropped; metrics.jsonl has them", name, self.dropped)

    def close(self, timeout_seconds: float) -> None:
        """Wait for the rows handed over and the writer's end, `timeout_seconds` at most. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            pass  # the thread looks at _closing once it gets on
        name = self.writer.name
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            log.warning("%s has not ended within %.0f s and is left; metrics.jsonl is complete", name, timeout_seconds)
        if self.dropped:
            log.warning("%s: %d rows of this start were dropped; metrics.jsonl has them", name, self.dropped)

    def _run(self) -> None:
        name = self.writer.name
        try:
            while not (self._closing.is_set() and self._rows.empty()):
                row = self._rows.get()
                if row is not None:
                    self.writer.write(*row)
        except Exception as error:  # whatever breaks there, training continues
            self.failed = True
            log.warning("%s failed (%s): nothing more is sent from this start; metrics.jsonl is complete", name, error)
        try:
            self.writer.close()
        except Exception as error:
            if not self.failed:
                log.warning("%s failed at the end (%s): metrics.jsonl is complete", name, error)


def flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested values as (prefix/name/..., value); lists are left out."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs.extend(flat(f"{prefix}/{name}", value))
        elif not isinstance(value, list):
            pairs.append((f"{prefix}/{name}", value))
    return pairs
