"""The guard: sees a loss spike, an explosion of the gradients or numbers that are not finite, and names the data to leave out.

It judges each step by the global loss and gradient norm, which are equal on all ranks, so all ranks decide alike without asking
each other. Non-finite gradients are not applied by any engine: that costs one update. A spike, an explosion, or several
non-finite steps in a row send the run back to its newest good checkpoint; from there on it leaves out the samples of the steps
in question (TrainState.skipped), which is what PaLM's authors did by hand (arXiv 2204.02311, section 5.1).

The samples left out stand in run_dir/skipped.json, written before the rewind, so a start after a crash leaves them out as well;
the number of entries is the budget used. The steps that the guard judges by are in each checkpoint's state.json.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megagpt.config import Config, UserError
from megagpt.data.state import TrainState, Window, sample_indices
from megagpt.files import read_json, write_json

SKIPPED_FILE = "skipped.json"

MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution is this times its median absolute deviation."""


class GuardConfig(Config):
    """When a run goes back to a checkpoint and leaves data out."""

    enabled: bool = True
    """Whether spikes, explosions and repeated non-finite steps make the run go back."""
    window_steps: int = Field(default=128, ge=8)
    """Steps before a step that it is compared with."""
    min_steps: int = Field(default=64, ge=8)
    """Only once so many steps can be compared with is a step called a spike."""
    loss_z: float = Field(default=10.0, gt=0)
    """A spike is a loss that rises over the median of the last few steps by so many robust standard deviations (MAD) more than
    usual ..."""
    loss_rise: float = Field(default=0.5, gt=0)
    """... and by at least so many nats."""
    grad_norm_ratio: float = Field(default=100.0, gt=1)
    """An explosion is a gradient norm, before clipping, of so many times the median of the steps before."""
    max_non_finite_steps: int = Field(default=3, gt=0)
    """So many non-finite steps in a row are left out one by one; one more, and the run goes back."""
    skip_steps: int = Field(default=4, gt=0)
    """Batches that are left out, from the one in which it was seen on; twice as many if it comes again right there."""
    max_rewinds: int = Field(default=10, ge=0)
    """How often a run may go back in its whole life."""

    @model_validator(mode="after")
    def _check(self) -> "GuardConfig":
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than window_steps={self.window_steps}")
        return self


@dataclass(frozen=True, slots=True)
class Step:
    """What is kept of a step to compare later ones with."""

    loss: float
    grad_norm: float


RECENT = 5
"""A loss is compared with the median of so many before it, so that the fall in a run's beginning does not count as spread."""


class Guard:
    """The steps before, and the samples left out."""

    def __init__(self, config: GuardConfig, run_dir: Path) -> None:
        """Reads run_dir/skipped.json if there is one."""
        self.config, self._path = config, run_dir / SKIPPED_FILE
        self._steps: deque[Step] = deque(maxlen=config.window_steps)
        self._non_finite_in_row = 0
        self._rewinds: list[dict[str, Any]] = read_json(self._path) if self._path.exists() else []

    def look(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, "" if it may stand; all ranks must give the same numbers."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._non_finite_in_row += 1
            if self.config.enabled and self._non_finite_in_row > self.config.max_non_finite_steps:
                return f"{self._non_finite_in_row} non-finite steps in a row"
            return ""
        self._non_finite_in_row = 0
        problem = judge(self._steps, Step(loss, grad_norm), self.config) if self.config.enabled else ""
        if not problem:
            self._steps.append(Step(loss, grad_norm))
        return problem

    def condemn(self, state: TrainState, problem: str, *, global_batch_size: int, write: bool) -> Window:
        """Leave out the samples from `state`'s step on; `write` on rank 0. Raises UserError if the budget is used up."""
        if len(self._rewinds) >= self.config.max_rewinds:
            raise UserError(
                f"guard.max_rewinds={self.config.max_rewinds}: the run went back so often already; now step {state.step}: "
                f"{problem}. See the data in {self._path}, or lower optim.lr; with a higher guard.max_rewinds it goes on"
            )
        window = window_to_skip(state, self.windows, self.config.skip_steps, global_batch_size)
        self._rewinds.append({"start": window.start, "count": window.count, "step": state.step, "reason": problem})
        if write:
            write_json(self._path, self._rewinds)
        return window

    @property
    def windows(self) -> tuple[Window, ...]:
        """All samples that are left out."""
        return tuple(Window(item["start"], item["count"]) for item in self._rewinds)

    def apply(self, state: TrainState) -> TrainState:
        """The state with all samples left out that have been condemned, at its first sample that is to be used."""
        state = replace(state, skipped=merge([*state.skipped, *self.windows]))
        return replace(state, samples=sample_indices(state, 1)[0])

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "non_finite_in_row": self._non_finite_in_row,
            "loss": [step.loss for step in self._steps],
            "grad_norm": [step.grad_norm for step in self._steps],
        }

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Judge by the steps that a checkpoint kept; by none after None."""
        saved = saved or {"non_finite_in_row": 0, "loss": [], "grad_norm": []}
        self._steps = deque(map(Step, saved["loss"], saved["grad_norm"]), maxlen=self.config.window_steps)
        # Those that led back to the checkpoint are no longer in the data.
        self._non_finite_in_row = int(saved["non_finite_in_row"])


def judge(before: Sequence[Step] | deque[Step], step: Step, config: GuardConfig) -> str:
    """Why a step is a spike or an explosion compared with those before it; "" if it is neither."""
    if len(before) < config.min_steps:
        return ""
    losses = [*(earlier.loss for earlier in before), step.loss]
    *rises, rise = (losses[i] - statistics.median(losses[i - RECENT : i]) for i in range(RECENT, len(losses)))
    median = statistics.median(rises)
    spread = MAD_TO_SIGMA * statistics.median(abs(usual - median) for usual in rises)
    z = (rise - median) / max(spread, 1e-12)
    if rise > config.loss_rise and z > config.loss_z:
        return f"loss spike: {step.loss:.4f}, {rise:.4f} above the steps before, {z:.1f} robust standard deviations"
    usual = statistics.median(earlier.grad_norm for earlier in before)
    if step.grad_norm > config.grad_norm_ratio * usual:
        return f"gradient explosion: norm {step.grad_norm:.4g}, {step.grad_norm / max(usual, 1e-30):.0f} times the median"
    return ""


def window_to_skip(state: TrainState, earlier: Sequence[Window], skip_steps: int, global_batch_size: int) -> Window:
    """The samples of `skip_steps` batches from `state` on. Where earlier windows end just there it was the update before, or
    the damage is wider: then one batch earlier, and twice as much, per such window."""
    first = sample_indices(state, 1)[0]
    near = sum(abs(window.start + window.count - first) <= skip_steps * global_batch_size for window in earlier)
    last = sample_indices(state, skip_steps * global_batch_size * 2**near)[-1]
    start = max(0, first - near * global_batch_size)
    return Window(start, last + 1 - start)


def merge(windows: Sequence[Window]) -> tuple[Window, ...]:
    """The same samples as windows that neither overlap nor touch, in order."""
    merged: list[Window] = []
    for window in sorted(windows, key=lambda window: window.start):
        if merged and window.start <= merged[-1].start + merged[-1].count:
            end = max(merged[-1].start + merged[-1].count, window.start + window.count)
            merged[-1] = Window(merged[-1].start, end - merged[-1].start)
        else:
            merged.append(window)
    return tuple(merged)
