"""Writers of a run's rows beside metrics.jsonl, each in its own thread: they never stop or slow training."""

import logging
import queue
import threading
import time
from typing import Any, Protocol

log = logging.getLogger(__name__)

MAX_ROWS = 1000
"""Most rows that wait for a writer; further ones are dropped and counted."""

WARN_SECONDS = 600.0
"""Least seconds between two warnings of dropped rows."""


class Writer(Protocol):
    """A destination of rows: W&B, TensorBoard, Prometheus. Only one thread at a time calls it."""

    name: str

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row of plain JSON values. It may raise anything, and may take long."""
        ...

    def close(self) -> None:
        """Send the remaining rows, and end."""
        ...


class BackgroundWriter:
    """A writer and its thread. After a writer raises it gets no further rows; while it blocks, rows are dropped and counted."""

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
        """Queue a row; it never waits."""
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
        """Wait until all queued rows are written and the writer has ended, for at most timeout_seconds. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            pass  # the thread checks _closing after the current row
        name = self.writer.name
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            log.warning("%s did not end within %.0f s and is abandoned; metrics.jsonl is complete", name, timeout_seconds)
        if self.dropped:
            log.warning("%s: %d rows of this attempt were dropped; metrics.jsonl has them", name, self.dropped)

    def _run(self) -> None:
        name = self.writer.name
        try:
            while not (self._closing.is_set() and self._rows.empty()):
                row = self._rows.get()
                if row is not None:
                    self.writer.write(*row)
        except Exception as error:  # training continues whatever fails here
            self.failed = True
            log.warning("%s failed (%s): this attempt sends it no more rows; metrics.jsonl is complete", name, error)
        try:
            self.writer.close()
        except Exception as error:
            if not self.failed:
                log.warning("%s failed at the end (%s): metrics.jsonl is complete", name, error)


def flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested values as pairs (prefix/name/..., value); lists are left out."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs.extend(flat(f"{prefix}/{name}", value))
        elif not isinstance(value, list):
            pairs.append((f"{prefix}/{name}", value))
    return pairs
