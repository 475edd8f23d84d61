"""A window of torch.profiler over some updates of a run: one trace per rank, for Perfetto or chrome://tracing; and the history
of a GPU's allocations, for the record of a rank that runs out of memory (megagpt.train.out_of_memory)."""

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
    """The ranks that record steps. The others wait for them while they write their trace."""
    allocation_history: int = Field(default=0, ge=0)
    """The newest allocations and releases of each rank's GPU that are remembered, with the lines of Python that made them; 0 =
    none. They are in the record of a rank that runs out of memory, which then names where the largest were made. Each takes
    about 2 microseconds (torch's figure) and some KB of host memory; 100000 is a good number. A CPU has none."""

    @model_validator(mode="after")
    def _check(self) -> "ProfileConfig":
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"profile.steps={list(self.steps)}: [first, last] with 1 <= first <= last is expected")
        if any(rank < 0 for rank in self.ranks):
            raise ValueError(f"profile.ranks={list(self.ranks)}: ranks are counted from 0")
        return self


def remember_allocations(config: ProfileConfig, device: torch.device) -> None:
    """Begin to keep the history that `config` asks for. A warning on a device that has none."""
    if config.allocation_history == 0:
        return
    if device.type != "cuda":
        log.warning(
            "profile.allocation_history=%d: nothing is kept on %s, only GPUs have a history", config.allocation_history, device
        )
        return
    torch.cuda.memory._record_memory_history(**history_options(config.allocation_history), device=device)


def history_options(max_entries: int) -> dict[str, Any]:
    """What torch records: allocations and releases, and the Python frames of each allocation; no C++ frames, which are slow."""
    return {"enabled": "all", "context": "alloc", "stacks": "python", "max_entries": max_entries}


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
