"""The memory of a node that background saves copy the state into: how much there is, and a block of it beside a GPU."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megagpt.checkpoint.partitions import own_share
from megagpt.config import UserError
from megagpt.distributed.world import World
from megagpt.engine.base import Engine, Partition
from megagpt.files import show_bytes

log = logging.getLogger(__name__)


class HostCopy:
    """One block of host memory for all shares of a rank, kept from save to save: fresh memory costs more than the copy.

    Beside a GPU its pages are locked. Torch's own pinned memory would round each allocation up to a power of two.
    """

    def __init__(self) -> None:
        self._memory, self._unlock = torch.empty(0), None

    def parts(self, lengths: Mapping[str, int], *, page_locked: bool) -> dict[str, Tensor]:
        """1-D fp32 views of the block by name, one after the other; what they hold is what the last save left there."""
        total = sum(lengths.values())
        if len(self._memory) != total:
            self.release()
            self._memory = torch.empty(total)
            self._unlock = lock_pages(self._memory) if page_locked and total else None
        return dict(zip(lengths, self._memory.split(list(lengths.values())), strict=True))

    def release(self) -> None:
        """Give the memory back."""
        if self._unlock is not None:
            self._unlock()
        self._memory, self._unlock = torch.empty(0), None


def lock_pages(memory: Tensor) -> Callable[[], None] | None:
    """Lock the pages of a CPU tensor for copies from a GPU; returns what undoes it, which must come before the tensor is freed.
    None, after a warning, where the driver refuses."""
    runtime: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    error = runtime.cudaHostRegister(address, memory.numel() * memory.element_size(), 0)
    if int(error) != 0:
        size = show_bytes(memory.numel() * memory.element_size())
        log.warning(
            "background saves: %s of host memory cannot be page-locked (%s): a step waits longer for a save", size, error
        )
        return None

    def unlock() -> None:
        runtime.cudaHostUnregister(address)

    return unlock


def refuse_small_node(engine: Engine, world: World) -> None:
    """Raise UserError, on all ranks, if the copies of a node's ranks need more than its free host memory; all call it."""
    refuse_full_nodes(world.gather((os.uname().nodename, bytes_of_copy(engine.state()), available_bytes())))


def refuse_full_nodes(ranks: Iterable[tuple[str, int, int]]) -> None:
    """The rule of `refuse_small_node`, of each rank's (node, bytes it copies, bytes that are free there)."""
    nodes: dict[str, list[tuple[int, int]]] = {}
    for node, needed, free in ranks:
        nodes.setdefault(node, []).append((needed, free))
    for node, found in nodes.items():
        needed, free = sum(size for size, _ in found), min(size for _, size in found)
        if needed > free:
            raise UserError(
                f"save_in_background=true: the copies of {len(found)} ranks on {node} need {show_bytes(needed)} of host "
                f"memory, {show_bytes(free)} are free: set save_in_background=false, or take more nodes"
            )


def bytes_of_copy(partitions: Mapping[str, Partition]) -> int:
    """What a rank copies in a background save."""
    return sum(4 * len(own_share(partition)[1]) for partition in partitions.values())


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Host memory that this process may still take: what the machine has free, or less where a cgroup limits it (SLURM's --mem,
    a container)."""
    free = psutil.virtual_memory().available
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return free
    unified = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if unified is None:
        return free
    folder = cgroups / unified.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(cgroups):
            break
        left = _left_in(group)
        free = free if left is None else min(free, left)
    return free


def _left_in(group: Path) -> int | None:
    """Bytes below a cgroup's limit, files in the page cache not counted, which the kernel drops; None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return max(0, int(limit) - max(0, used - cached))
