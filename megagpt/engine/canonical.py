"""Sums whose bits do not depend on the layout: gradients in the order of the micro-batches, and their norm in fixed blocks.

Floating-point addition is not associative, so the usual reductions give different last bits on another number of ranks. Here
each micro-batch's gradient crosses ranks by itself (an all-to-all, the traffic of a reduce-scatter), and the rank that keeps an
element adds the micro-batches' values one by one, in fp32, in the order of their numbers in the step; micro-batch j is computed
by rank j % ranks (megagpt.data.loader), so a round of one micro-batch per rank holds consecutive numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.distributed.world import World
from megagpt.engine.optim import Optimizer

BLOCK = 4096
"""Elements of a flattened parameter whose squares are added up together; a power of two."""


class OrderedSum:
    """This rank's part of a gradient, summed over micro-batches in their order."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, contributions: Tensor) -> Tensor:
        """Add one micro-batch of each rank; `contributions` [ranks * n] fp32 is this rank's gradient, a part of n elements for
        each rank. Returns the sum so far of this rank's part [n], which later calls change."""
        received = torch.empty_like(contributions)
        dist.all_to_all_single(received, contributions)
        for part in received.view(dist.get_world_size(), -1):
            if self._total is None:
                self._total = part.clone()
            else:
                self._total += part
        assert self._total is not None
        return self._total

    def take(self) -> Tensor:
        """The sum of the step; the next `add` begins a new one."""
        total, self._total = self._total, None
        assert total is not None, "no micro-batch was added"
        return total


class OrderedReduceScatter:
    """An OrderedSum in the place of FSDP2's reduce-scatter of one unit: it puts out the sum since the step began, so that the
    sharded gradients of the micro-batch before have to be dropped instead of added to."""

    def __init__(self) -> None:
        self.sum = OrderedSum()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input and the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        """Exchange `input_tensor` and put this rank's sum into `output_tensor`."""
        output_tensor.copy_(self.sum.add(input_tensor))


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements [start, start + length) of a flattened parameter of `numel` elements, which this rank keeps."""

    start: int
    length: int
    numel: int


class BlockNorm:
    """The L2 norm of a gradient that is spread over the ranks, with the same bits for every way to cut it.

    Each flattened parameter is cut into BLOCKs; squares are summed in fp64 by a fixed tree inside each and then over all.
    A block that several ranks share is put together first, which is exact: each element comes from one rank, zeros from others.
    """

    def __init__(self, extents: Sequence[Extent], numels: Iterable[int], parameters: Sequence[int], world: World) -> None:
        """`numels` of all parameters, in the same order on all ranks; extents[i] is in parameter number parameters[i]."""
        first_blocks = [0]
        for numel in numels:
            first_blocks.append(first_blocks[-1] - (-numel // BLOCK))
        self._extents, self._num_blocks = list(extents), first_blocks[-1]
        self._first = [first_blocks[parameter] for parameter in parameters]
        partial = {block for i in range(len(self._extents)) for block in self._partial_blocks(i)}
        shared = sorted({block for blocks in world.gather(sorted(partial)) for block in blocks})
        self._row_of = {block: row for row, block in enumerate(shared)}
        self._shared = torch.tensor(shared, dtype=torch.int64, device=world.device)

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm, an fp64 scalar; gradients[i] is the 1-D gradient of extents[i]."""
        device = self._shared.device
        sums = torch.zeros(self._num_blocks, dtype=torch.float64, device=device)
        shared = torch.zeros(len(self._shared), BLOCK, dtype=torch.float64, device=device)
        for i, gradient in enumerate(gradients):
            self._add(i, gradient.double().square(), sums, shared)
        dist.all_reduce(sums)
        dist.all_reduce(shared)
        sums[self._shared] = tree_sum(shared)
        return tree_sum(sums[None])[0].sqrt()

    def _add(self, i: int, squares: Tensor, sums: Tensor, shared: Tensor) -> None:
        """Put the squares of extent i where they belong: whole blocks into sums, the rest into the rows of shared ones."""
        extent, first = self._extents[i], self._first[i]
        for block in self._partial_blocks(i):
            begin = max(extent.start, (block - first) * BLOCK)
            end = min(extent.start + extent.length, (block - first + 1) * BLOCK)
            place = begin - (block - first) * BLOCK
            shared[self._row_of[block], place : place + end - begin] = squares[begin - extent.start : end - extent.start]
        begin, end = self._whole_blocks(i)
        if begin < end:
            held = squares[begin * BLOCK - extent.start : end * BLOCK - extent.start]
            missing = (end - begin) * BLOCK - len(held)  # behind the parameter's end
            padded = torch.nn.functional.pad(held, (0, missing)).view(end - begin, BLOCK)
            sums[first + begin : first + end] = tree_sum(padded)

    def _whole_blocks(self, i: int) -> tuple[int, int]:
        """Blocks of its parameter, from and to, that extent i covers (the last one as far as the parameter goes)."""
        extent = self._extents[i]
        end = extent.start + extent.length
        return -(-extent.start // BLOCK), (-(-end // BLOCK) if end == extent.numel else end // BLOCK)

    def _partial_blocks(self, i: int) -> list[int]:
        """Numbers over all parameters of the blocks that extent i covers in part."""
        extent, (begin, end) = self._extents[i], self._whole_blocks(i)
        touched = range(extent.start // BLOCK, -(-(extent.start + extent.length) // BLOCK))
        return [self._first[i] + block for block in touched if not begin <= block < end]


def tree_sum(rows: Tensor) -> Tensor:
    """Sums of the rows of a [n, m] tensor, [n]: halves are added elementwise, so the order is the same on every device."""
    width = 1 << max(0, rows.shape[1] - 1).bit_length()
    rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def without_fused_kernels(optimizer: Optimizer) -> None:
    """Let AdamW work operation by operation: torch's fused CPU kernel rounds the last few elements of a tensor differently, and
    which elements these are depends on how the parameters are cut."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = False, True


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by, as torch.nn.utils.clip_grad_norm_ does; 1 = nothing to do."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
