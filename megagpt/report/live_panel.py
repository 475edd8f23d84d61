"""The panel of a run on its own terminal: a writer of rows (megagpt.monitor.writers). Needs rich, no torch."""

import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live

from megagpt.report.panel import run_panel
from megagpt.report.run_state import RunReader

LEAST_SECONDS = 2.0
"""Least seconds between two drawings."""
SHARE = 0.005
"""Largest share of one core's time that drawing takes in the long run."""


class LivePanel:
    """Redraws the panel at the bottom of a terminal when rows come; log lines appear above it."""

    name = "the panel"

    def __init__(self, run_dir: Path, stream: TextIO) -> None:
        """stream: a terminal. Nothing is written before the first row."""
        self._reader, self._stream = RunReader(run_dir), stream
        self._console = Console(file=stream, markup=False, highlight=False)
        self._live: Live | None = None
        self._moved: list[logging.StreamHandler[Any]] = []
        self._next = float("-inf")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A row has been logged: draw, unless the last drawing was too recent."""
        if time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw the final state, which stays on the terminal."""
        self._draw()
        if self._live is not None:
            self._live.stop()
        for handler in self._moved:
            handler.setStream(self._stream)

    def _draw(self) -> None:
        begun = time.thread_time()
        panel = run_panel(self._reader.read(time.time()), self._console.width)
        if self._live is None:
            self._live = Live(panel, console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start(refresh=True)
            self._console.show_cursor(True)  # a killed run would leave it hidden
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                    handler.setStream(sys.stderr)  # rich has replaced it by a stream that writes above the panel
                    self._moved.append(handler)
        else:
            self._live.update(panel, refresh=True)
        self._next = time.monotonic() + pause_after(time.thread_time() - begun)


def pause_after(cpu_seconds: float) -> float:
    """Seconds until the next drawing, after one that took `cpu_seconds`."""
    return max(LEAST_SECONDS, cpu_seconds / SHARE)
