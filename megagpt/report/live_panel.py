"""The panel of a run on the terminal of its own training: a writer of rows (megagpt.monitor.writers). Needs rich, no torch."""

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
"""Between two drawings."""
SHARE = 0.005
"""Of one core's time, which drawing takes at most in the long run."""


class LivePanel:
    """Draws the panel anew as rows come, at the bottom of a terminal; what is logged to it meanwhile stands above."""

    name = "the panel"

    def __init__(self, run_dir: Path, stream: TextIO) -> None:
        """`stream`: a terminal. Nothing is written before the first row."""
        self._reader, self._stream = RunReader(run_dir), stream
        self._console = Console(file=stream, markup=False, highlight=False)
        self._live: Live | None = None
        self._moved: list[logging.StreamHandler[Any]] = []
        self._next = float("-inf")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A row has been logged: draw, unless the last time is too near."""
        if time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw the end of the run, which stays on the terminal."""
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
                    handler.setStream(sys.stderr)  # which rich has replaced by one that writes above the panel
                    self._moved.append(handler)
        else:
            self._live.update(panel, refresh=True)
        self._next = time.monotonic() + pause_after(time.thread_time() - begun)


def pause_after(cpu_seconds: float) -> float:
    """Seconds until the next drawing, after one that took so much CPU time."""
    return max(LEAST_SECONDS, cpu_seconds / SHARE)
