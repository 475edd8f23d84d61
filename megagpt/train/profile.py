"""A window of torch.profiler over some updates of a run: one trace per rank, for Perfetto or chrome://tracing."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from megagpt.config import Config

log = logging.getLogger(__name__)


class ProfileConfig(Config):
    """Which updates are recorded. Nothing here changes the model that comes out; recorded steps are slower by about half."""

    steps: tuple[int, int] | None = None
    """The first and the last update that is recorded, e.g. [20, 22]; null = none. Traces grow by some megabytes per step."""
    ranks: tuple[int, ...] = Field(default=(0,), min_length=1)
    """The ranks that record. The others wait for them while they write their trace."""

    @model_validator(mode="after")
    def _check(self) -> "ProfileConfig":
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"profile.steps={list(self.steps)}: [first, last] with 1 <= first <= last is expected")
        if any(rank < 0 for rank in self.ranks):
            raise ValueError(f"profile.ranks={list(self.ranks)}: ranks are counted from 0")
        return self


class StepProfiler:
    """Records the window on the ranks that are named, and nothing elsewhere."""

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        rank: int,
        attempt: int,
        clock: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """clock: the run's stopwatch; writing a trace is charged to "save", so that the watchdog allows for it."""
        self._window = config.steps if rank in config.ranks else None
        self._folder, self._name, self._clock = run_dir / "profiles", f"attempt_{attempt:04d}_rank_{rank:04d}", clock
        self._profile: Any = None
        self._first = self._last = 0

    def before(self, step: int) -> None:
        """An update begins after `step` of them. An attempt that begins inside the window records the rest of it."""
        if self._window is None or self._profile is not None or not self._window[0] <= step + 1 <= self._window[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._first = step + 1
        self._profile.start()

    def after(self, step: int) -> None:
        """An update has ended; `step` are done."""
        self._last = step
        if self._profile is not None and self._window is not None and step >= self._window[1]:
            self._window = None  # a rewind does not record it again
            self.close()

    def close(self) -> None:
        """Write what was recorded. A trace that cannot be written is a warning. Safe to call twice."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        path = self._folder / f"{self._name}_steps_{self._first}_to_{self._last}.json.gz"
        with self._clock("save"):
            try:
                profile.stop()
                self._folder.mkdir(parents=True, exist_ok=True)
                profile.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:
                log.warning("%s: the trace could not be written: %s", path, error)
            else:
                log.info("profile of updates %d to %d: %s (open it at ui.perfetto.dev)", self._first, self._last, path)
