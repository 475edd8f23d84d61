"""The protocol of an engine, with its partitions and the results of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megagpt.distributed.device_timer import DeviceTimer
from megagpt.distributed.fetch import fetched
from megagpt.model.gpt import GPT


@dataclass(frozen=True, slots=True)
class Partition:
    """A contiguous run of a flattened parameter (or of an optimizer state of it) that lives on this rank.

    data: 1-D fp32 view of the engine's memory. start: its offset in the flattened parameter. numel: the length of the whole.
    copy, copies: `copies` ranks hold this same run and this is number `copy`; each writes its share of it.
    """

    data: Tensor
    start: int
    numel: int
    copy: int = 0
    copies: int = 1


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one update: global L2 norm of the gradients before clipping, and whether the update was applied."""

    grad_norm: float
    applied: bool


class Steps:
    """What engines have in common: an update that is read at once."""

    updates: int
    collective_waits: DeviceTimer | None = None
    """See Engine."""

    def launch_step(self, lr: float, max_norm: float) -> Tensor:
        """See Engine."""
        raise NotImplementedError

    def count_update(self, applied: bool) -> None:
        """See Engine."""
        self.updates += applied

    def step(self, lr: float, max_norm: float) -> StepResult:
        """See Engine."""
        grad_norm, applied = fetched(self.launch_step(lr, max_norm))
        self.count_update(bool(applied))
        return StepResult(grad_norm, bool(applied))


class Engine(Protocol):
    """A model spread over ranks."""

    model: Callable[..., Tensor]
    module: GPT
    updates: int
    formats: dict[str, str]
    """What the tensors of the first update were, see megagpt.engine.dtypes; filled by then."""
    collective_waits: DeviceTimer | None
    """What computing on a GPU waits for collectives, where the engine knows it: what overlaps with computing is not counted."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of `loss`; `last` marks the step's last micro-batch."""
        ...

    def launch_step(self, lr: float, max_norm: float) -> Tensor:
        """Clip to `max_norm` (0 = no clipping), update, zero the gradients. A non-finite update is reported, not applied.

        Returns fp64 [2] on the device: the norm before clipping, and 1 if the update was applied, else 0. FSDP with AdamW, but
        in canonical order, fetches nothing for it. The caller passes the result to `count_update`.
        """
        ...

    def count_update(self, applied: bool) -> None:
        """Count an update of `launch_step` in `updates` if it was applied."""
        ...

    def step(self, lr: float, max_norm: float) -> StepResult:
        """`launch_step`, read at once and counted."""
        ...

    def state(self) -> dict[str, Partition]:
        """`param.<name>` and `<optimizer state>.<name>` of the weights that this rank trains, as views: writing changes the
        engine."""
        ...

    def frozen(self) -> dict[str, Partition]:
        """`param.<name>` of what is not trained: this rank's part of the working weights, in their type, to be written once."""
        ...

    def refresh(self, updates: int) -> None:
        """After the partitions were written: rebuild the working weights and set the optimizer's step counts to `updates`."""
        ...
