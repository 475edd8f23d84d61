"""Watch runs from their files: the panel of one run or a table of all runs below a folder, once or live. No torch."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from pydantic import Field, model_validator
from rich.console import Console, RenderableType
from rich.live import Live

from megagpt.config import Config, UserError
from megagpt.report.panel import run_panel, runs_table
from megagpt.report.run_state import RunReader, RunState, find_runs


class WatchConfig(Config):
    """Which runs to watch, and how. Give run_dir or runs."""

    run_dir: Path | None = None
    """Show the panel of this run."""
    runs: Path | None = None
    """Show a table of all runs below this folder."""
    once: bool = False
    """Print once and end. This is always so if standard output is not a terminal."""
    refresh_seconds: float = Field(default=5.0, ge=0.2)
    """Seconds between two readings of the files."""
    num_events: int = Field(default=6, ge=0)
    """Number of latest events that a panel shows."""
    width: int | None = Field(default=None, ge=30)
    """Width in columns; null = the terminal's."""

    @model_validator(mode="after")
    def _check(self) -> "WatchConfig":
        if (self.run_dir is None) == (self.runs is None):
            raise ValueError("give one of run_dir and runs: run_dir=runs/first, or runs=runs for all below a folder")
        return self


def watch(config: WatchConfig) -> None:
    """Print the panel or table once, or show it until Ctrl-C. When the run has finished, its panel stays and the call returns.

    It only reads files. Raises UserError if there is no such run.
    """
    console = Console(file=sys.stdout, width=config.width, markup=False, highlight=False)
    view = _View(config, console.width)
    if config.once or not console.is_terminal:
        console.print(view.render())
        return
    try:
        with Live(view.render(), console=console, auto_refresh=False, screen=False) as live:
            while not view.over:
                time.sleep(config.refresh_seconds)
                view.width = config.width or os.get_terminal_size(sys.stdout.fileno()).columns
                live.update(view.render(), refresh=True)
    except KeyboardInterrupt:
        return


class _View:
    """Reads and renders the runs that are shown."""

    def __init__(self, config: WatchConfig, width: int) -> None:
        self.width, self.over = width, False
        self._config = config
        self._readers: dict[Path, RunReader] = {}

    def render(self) -> RenderableType:
        """Read the files and return the panel or table to show."""
        config, now = self._config, time.time()
        if config.run_dir is not None:
            state = self._reader(config.run_dir).read(now)
            self.over = state.status == "finished"
            return run_panel(state, self.width, num_events=config.num_events)
        assert config.runs is not None
        return runs_table([self._state(config.runs, path, now) for path in find_runs(config.runs)], self.width)

    def _state(self, folder: Path, path: Path, now: float) -> RunState:
        name = str(path.relative_to(folder)) if path != folder else path.resolve().name
        try:
            state = self._reader(path).read(now)
        except UserError as error:
            return RunState(name, "not readable", now, problems=(str(error),))
        return replace(state, name=name)

    def _reader(self, path: Path) -> RunReader:
        return self._readers.setdefault(path, RunReader(path))
