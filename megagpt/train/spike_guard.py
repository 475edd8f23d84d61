"""The guard: sees a loss spike, an explosion of the gradients or numbers that are not finite, and names the data to leave out.

It judges each step by the global loss and gradient norm, which are equal on all ranks, so all ranks decide alike without asking
each other. Non-finite gradients are not applied by any engine: that costs one update. A spike, an explosion, or several
non-finite steps in a row send the run back to its newest good checkpoint; from there on it leaves out the samples of the steps
in question (TrainState.skipped), which is what PaLM's authors did by hand (arXiv 2204.02311, section 5.1).

A step is compared with the steps since the last planned change (the loop names the `regime` of each step: data and their
weights, batch size, model, optimizer). Until there are min_steps of them their level counts, but what is usual still comes from
before the change, and a spike has to be larger than the change itself was. When the samples right behind those left out bring
the same verdict again and again, they are not the cause: all of them are used after all, and the step counts as a change.

The samples left out are in run_dir/skipped.json, written before the rewind, so a start after a crash leaves them out as well.
The steps that the guard judges by are in each checkpoint's state.json.
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
    """When a run goes back to a checkpoint and skips data."""

    enabled: bool = True
    """Whether spikes, explosions and repeated non-finite steps make the run go back."""
    window_steps: int = Field(default=128, ge=8)
    """How many earlier steps a step is compared with."""
    min_steps: int = Field(default=64, ge=8)
    """The number of earlier steps that the guard needs before it can call a step a spike."""
    loss_z: float = Field(default=10.0, gt=0)
    """A spike is a loss that rises above the median of the last few steps by this many robust standard deviations (MAD)
    more than usual ..."""
    loss_rise: float = Field(default=0.5, gt=0)
    """... and by at least this many nats."""
    grad_norm_ratio: float = Field(default=100.0, gt=1)
    """An explosion is a gradient norm, before clipping, of this many times the median of the steps before."""
    max_non_finite_steps: int = Field(default=3, gt=0)
    """At most this many non-finite steps in a row are skipped one by one; after one more the run goes back."""
    skip_steps: int = Field(default=4, gt=0)
    """How many batches are skipped, from the one with the problem on; twice as many if it comes again right there."""
    max_repeats: int = Field(default=1, ge=1)
    """How often the samples right behind skipped ones may be skipped as well. The same verdict at the same step once more
    says that the samples are not the cause: they are used after all, and the step counts as a planned change."""
    max_rewinds: int = Field(default=10, ge=0)
    """How often a run may go back in all; a withdrawn verdict counts once with all its repeats."""
    cleared_windows: int = Field(default=0, ge=0)
    """The first n entries of run_dir/skipped.json no longer count: their samples are used from here on. Each start logs how
    many entries skip samples, also with enabled=false."""

    @model_validator(mode="after")
    def _check(self) -> "GuardConfig":
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than window_steps={self.window_steps}")
        return self


@dataclass(frozen=True, slots=True)
class Step:
    """What later steps are compared with."""

    loss: float
    grad_norm: float
    begins: bool = False
    """Whether it is the first one after a planned change."""


RECENT = 5
"""A loss is compared with the median of this many before it: the fall at the start of a run does not count as spread."""

SETTLING_RISE = 4.0
"""Within min_steps of a planned change a spike has to rise by this many `loss_rise`, and by more than the change itself:
the new mixture's spread of losses is not known yet."""

Regime = Mapping[str, Any]
"""What the loss depends on by plan at a step, by name: JSON values."""


class Guard:
    """The steps before, and the samples left out."""

    def __init__(self, config: GuardConfig, run_dir: Path) -> None:
        """Reads run_dir/skipped.json if there is one. Raises UserError if it has fewer entries than are to be cleared."""
        self.config, self._path = config, run_dir / SKIPPED_FILE
        self._steps: deque[Step] = deque(maxlen=config.window_steps)
        self._non_finite_in_row = 0
        self._regime: dict[str, Any] | None = None
        self._begins = False
        self._rewinds: list[dict[str, Any]] = read_json(self._path) if self._path.exists() else []
        if config.cleared_windows > len(self._rewinds):
            raise UserError(f"guard.cleared_windows={config.cleared_windows}: {self._path} has {len(self._rewinds)} entries")

    def enter(self, step: int, regime: Regime) -> str:
        """Call it before a step (its number, from 0) is judged: the planned changes since the step before; "" if none."""
        before, self._regime = self._regime, dict(regime)
        if before is None:  # a new run, or a checkpoint of an older release
            self._begins = len(self._steps) > 0
            return ""
        changes = [f"{name}: {before.get(name)} -> {value}" for name, value in regime.items() if before.get(name) != value]
        if step in self._taken_back_at:
            changes.append(f"the guard's verdict at step {step} was taken back")
        self._begins = self._begins or bool(changes)
        return ", ".join(changes)

    def look(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, "" if it may stand; all ranks must give the same numbers."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._non_finite_in_row += 1
            if self.config.enabled and self._non_finite_in_row > self.config.max_non_finite_steps:
                return f"{self._non_finite_in_row} {NON_FINITE}"
            return ""
        self._non_finite_in_row = 0
        step = Step(loss, grad_norm, self._begins)
        problem = judge(self._steps, step, self.config) if self.config.enabled else ""
        if not problem:
            self._steps.append(step)
            self._begins = False
        return problem

    def condemn(self, state: TrainState, problem: str, *, global_batch_size: int, write: bool) -> Window | None:
        """Leave out the samples from `state`'s step on; `write` on rank 0. None: the verdict is taken back, with those before
        it at this place. Raises UserError if the budget is used up."""
        used = len(self._active) + sum(bool(item.get("taken_back")) and not item["count"] for item in self._rewinds)
        if used >= self.config.max_rewinds:
            raise UserError(
                f"guard.max_rewinds={self.config.max_rewinds}: the run has gone back this often; now step {state.step}: "
                f"{problem}. Look at the samples of {self._path}: if they are bad, raise guard.max_rewinds; if they "
                f"are good, the guard is wrong: guard.cleared_windows={len(self._rewinds)} uses them, and guard.enabled=false "
                f"or a higher guard.loss_z ends the rewinds"
            )
        before = self._right_before(state, problem, global_batch_size)
        window = None
        if len(before) > self.config.max_repeats and NON_FINITE not in problem:
            for item in before:
                item["taken_back"] = True
            first = sample_indices(state, 1)[0]
            entry = {"start": first, "count": 0, "step": min(item["step"] for item in before), "taken_back": True}
        else:
            window = window_to_skip(state, len(before), self.config.skip_steps, global_batch_size)
            entry = {"start": window.start, "count": window.count, "step": state.step}
        self._rewinds.append({**entry, "reason": problem})
        if write:
            write_json(self._path, self._rewinds)
        return window

    def _right_before(self, state: TrainState, problem: str, global_batch_size: int) -> list[dict[str, Any]]:
        """The entries, last one first, that left out the samples right before `state`'s for the same reason."""
        found: list[dict[str, Any]] = []
        reach = sample_indices(state, 1)[0]
        for item in reversed(self._active):
            near = abs(item["start"] + item["count"] - reach) <= self.config.skip_steps * global_batch_size
            if not near or _kind(item["reason"]) != _kind(problem):
                break
            found.append(item)
            reach = item["start"]
        return found

    @property
    def _active(self) -> list[dict[str, Any]]:
        """The entries that leave samples out."""
        return [item for item in self._rewinds[self.config.cleared_windows :] if not item.get("taken_back")]

    @property
    def _taken_back_at(self) -> set[int]:
        return {item["step"] for item in self._rewinds if item.get("taken_back") and not item["count"]}

    @property
    def windows(self) -> tuple[Window, ...]:
        """All samples that are left out."""
        return tuple(Window(item["start"], item["count"]) for item in self._active)

    def summary(self) -> str:
        """What run_dir/skipped.json leaves out, in words; "" if there is no entry in it."""
        if not self._rewinds:
            return ""
        samples = sum(window.count for window in merge(self.windows))
        cleared = f", {self.config.cleared_windows} entries are cleared" if self.config.cleared_windows else ""
        taken_back = sum(bool(item.get("taken_back")) for item in self._rewinds)
        more = f", {taken_back} entries were taken back" if taken_back else ""
        return f"{samples} samples in {len(self.windows)} windows, {SKIPPED_FILE}{cleared}{more}"

    def apply(self, state: TrainState) -> TrainState:
        """The state with all samples left out that are condemned now, at its first sample that is to be used.

        Samples that it passed over, but that are condemned no longer, are used if none behind them has been.
        """
        samples = next((w.start for w in state.skipped if w.start < state.samples <= w.start + w.count), state.samples)
        passed = [window for window in state.skipped if window.start + window.count <= samples]
        ends = [(max(window.start, samples), window.start + window.count) for window in self.windows]
        coming = [Window(start, end - start) for start, end in ends if start < end]
        state = replace(state, samples=samples, skipped=merge([*passed, *coming]))
        return replace(state, samples=sample_indices(state, 1)[0])

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "non_finite_in_row": self._non_finite_in_row,
            "loss": [step.loss for step in self._steps],
            "grad_norm": [step.grad_norm for step in self._steps],
            "begins": [number for number, step in enumerate(self._steps) if step.begins],
            "begins_next": self._begins,
            "regime": self._regime,
        }

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Judge by the steps that a checkpoint kept; by none after None."""
        saved = saved or {"non_finite_in_row": 0, "loss": [], "grad_norm": []}
        begins = set(saved.get("begins", ()))
        pairs = zip(saved["loss"], saved["grad_norm"], strict=True)
        steps = [Step(loss, grad_norm, number in begins) for number, (loss, grad_norm) in enumerate(pairs)]
        self._steps = deque(steps, maxlen=self.config.window_steps)
        self._begins, self._regime = bool(saved.get("begins_next", False)), saved.get("regime")
        # Those that led back to the checkpoint are no longer in the data.
        self._non_finite_in_row = int(saved["non_finite_in_row"])


NON_FINITE = "non-finite steps in a row"


def _kind(reason: str) -> str:
    """What a verdict says without its numbers."""
    return NON_FINITE if NON_FINITE in reason else reason.partition(":")[0]


def judge(before: Sequence[Step] | deque[Step], step: Step, config: GuardConfig) -> str:
    """Why a step is a spike or an explosion compared with those before it; "" if it is neither."""
    if len(before) < config.min_steps:
        return ""
    stretches: list[list[Step]] = [[]]
    for earlier in (*before, step):
        if earlier.begins:
            stretches.append([])
        stretches[-1].append(earlier)
    *past, (*current, _) = stretches
    settled = not any(past) or len(current) >= config.min_steps
    compared = [current] if settled else [*past, current]
    if len(current) >= RECENT:
        rises = [rise for stretch in compared for rise in _rises(stretch)]
        rise = step.loss - statistics.median(earlier.loss for earlier in current[-RECENT:])
        least = config.loss_rise
        if not settled:
            least = max(SETTLING_RISE * least, _change(past[-1], current) if past[-1] else 0.0)
        z = _robust_z(rise, rises, () if settled else _rises(current))
        if rise > least and z > config.loss_z:
            return f"loss spike: {step.loss:.4f}, {rise:.4f} above the steps before, {z:.1f} robust standard deviations"
    usual = statistics.median(earlier.grad_norm for stretch in compared for earlier in stretch)
    if step.grad_norm > config.grad_norm_ratio * usual:
        return f"gradient explosion: norm {step.grad_norm:.4g}, {step.grad_norm / max(usual, 1e-30):.0f} times the median"
    return ""


def _rises(stretch: Sequence[Step]) -> list[float]:
    """How much each loss is above the median of the RECENT ones before it."""
    losses = [step.loss for step in stretch]
    return [losses[i] - statistics.median(losses[i - RECENT : i]) for i in range(RECENT, len(losses))]


def _change(past: Sequence[Step], current: Sequence[Step]) -> float:
    """How far apart the losses before and after a planned change are."""
    before, after = (statistics.median(step.loss for step in steps) for steps in (past[-RECENT:], current[:RECENT]))
    return abs(after - before)


def _robust_z(rise: float, rises: Sequence[float], own: Sequence[float]) -> float:
    """How many robust standard deviations (MAD) a rise is above the usual ones, -inf without any; with `own` rises of the time
    since a change, once there are some, by the larger of both spreads."""
    if not rises:
        return -math.inf
    median = statistics.median(rises)
    spread = statistics.median(abs(usual - median) for usual in rises)
    if len(own) > RECENT:
        spread = max(spread, statistics.median(abs(usual - statistics.median(own)) for usual in own))
    return (rise - median) / max(MAD_TO_SIGMA * spread, 1e-12)


def window_to_skip(state: TrainState, repeats: int, skip_steps: int, global_batch_size: int) -> Window:
    """The samples of `skip_steps` batches from `state` on. Where it has come `repeats` times just before, it was the update
    before, or the damage is wider: then one batch earlier, and twice as much, for each of them."""
    first = sample_indices(state, 1)[0]
    last = sample_indices(state, skip_steps * global_batch_size * 2**repeats)[-1]
    start = max(0, first - repeats * global_batch_size)
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
