"""Values that come from the device to the host. Whatever waits for a GPU in a training step does it here, so the watchdog knows
such a wait by its frame (megagpt.watchdog.stacks), and a step's waits can be counted.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.distributed.world import World


def fetched(values: Tensor) -> list[float]:
    """The values of a 1-D tensor; waits until the device has computed them."""
    return values.tolist()


@dataclass(frozen=True, slots=True)
class Record:
    """One row of numbers per rank that is on its way to the host."""

    _rows: Tensor
    _ready: Any

    def read(self) -> list[list[float]]:
        """[ranks][numbers]; waits until the device has computed them. To be read before `slots` more records are sent."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._rows.tolist()  # on the host already


class Records:
    """Sends what a step has computed to the host without waiting for it: the ranks' rows are gathered on the device and copied
    to pinned memory, of which there are `slots` that are used in turn."""

    def __init__(self, world: World, slots: int = 2) -> None:
        self._world, self._memory, self._sent = world, [torch.empty(0, dtype=torch.float64)] * slots, 0

    def send(self, values: Tensor) -> Record:
        """Begin to gather the 1-D fp64 `values`, equally many on every rank and on the world's device."""
        rows = values[None]
        if self._world.size > 1:
            flat = values.new_empty(self._world.size * len(values))
            dist.all_gather_into_tensor(flat, values)
            rows = flat.view(self._world.size, -1)
        if values.device.type != "cuda":
            return Record(rows, None)
        slot, self._sent = self._sent % len(self._memory), self._sent + 1
        if self._memory[slot].shape != rows.shape:
            self._memory[slot] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._memory[slot].copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Record(self._memory[slot], event)
