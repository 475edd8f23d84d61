"""Muon where ranks hold runs of flattened matrices (ZeRO 1 to 3): whole matrices are dealt to ranks for the update.

Momentum is elementwise, so each rank keeps it for the elements it holds, and checkpoints see nothing new. What needs a whole
matrix is the orthogonalisation: every matrix has an owner, the ranks send it their parts of the matrix (an all-to-all), it
orthogonalises, and sends each its part of the update. Owners are chosen so that all have about as much to compute.

DeepSpeed 0.19 has a Muon of its own, which orthogonalises before it clips: the gradient norm is then that of updates, clipping
scales them, and a non-finite gradient stays in the momentum. It is not used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.distributed.world import World
from megagpt.engine.optim import OPTIMIZERS, OptimConfig


@dataclass(frozen=True, slots=True)
class Held:
    """A run of a flattened matrix in a flat partition: elements [start, start + length), from `offset` of the partition on."""

    name: str
    shape: tuple[int, int]
    offset: int
    start: int
    length: int


class DealtMatrices(torch.optim.Optimizer):
    """An optimizer that needs whole matrices for those of the blocks, adamw for the rest, on flat partitions.

    An engine calls `deal` once it has its partitions; a step before that changes nothing.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        matrices, rest = ([g for g in groups if (g["kind"] == config.kind) is whole] for whole in (True, False))
        a_matrix = [nn.Parameter(torch.zeros(1, 1))]  # ZeRO 3 has already cut the real ones
        defaults = OPTIMIZERS[config.kind].build([{"params": a_matrix}], config).defaults
        self._rest = OPTIMIZERS["adamw"].build(rest, config)
        self._kind, self._exchanges = config.kind, dict[Tensor, _Exchange]()
        super().__init__([*({**defaults, **group} for group in matrices), *self._rest.param_groups], {})

    def deal(self, held: Mapping[Tensor, Sequence[Held]], world: World) -> None:
        """Give every matrix an owner; `held` says what is where in this rank's flat partitions, in the same order on all ranks.
        All ranks call it together."""
        by_rank = world.gather(list(held.values()))
        for number, flat in enumerate(held):
            self._exchanges[flat] = _Exchange([parts[number] for parts in by_rank], world)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the partitions that are in the groups now; all ranks call it together."""
        for group in self.param_groups if self._exchanges else ():
            if group["kind"] != self._kind:
                self._rest.param_groups, self._rest.state = [group], self.state
                self._rest.step()
                continue
            for flat in group["params"]:
                momentum, gradient = self.state[flat]["momentum_buffer"], flat.grad
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                change = self._exchanges[flat](update, group)
                flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(change)


class _Exchange:
    """The matrices of one flat partition: who owns which, and what goes where."""

    def __init__(self, by_rank: Sequence[Sequence[Held]], world: World) -> None:
        shapes = {held.name: held.shape for part in by_rank for held in part}
        owners = owners_of(shapes, world.size)
        self._world, self._shapes = world, {name: shape for name, shape in shapes.items() if owners[name] == world.rank}
        self._sent = sorted(by_rank[world.rank], key=lambda held: (owners[held.name], held.name))
        """What this rank holds, in the order of the owners."""
        self._received = [
            sorted((held for held in part if held.name in self._shapes), key=lambda held: held.name) for part in by_rank
        ]
        """What each rank holds of the matrices of this one."""
        self._sizes = [sum(held.length for held in self._sent if owners[held.name] == rank) for rank in range(world.size)]
        self._received_sizes = [sum(held.length for held in part) for part in self._received]

    def __call__(self, update: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What to add to a flat partition whose momentum gives `update`, with the learning rate."""
        sent = [update[held.offset : held.offset + held.length] for held in self._sent]
        arrived = self._swap(sent, self._sizes, self._received_sizes)
        matrices = {name: nn.Parameter(torch.zeros(shape, device=arrived.device)) for name, shape in self._shapes.items()}
        for matrix in matrices.values():
            matrix.grad = torch.empty_like(matrix)
        places = [held for part in self._received for held in part]
        for held, piece in zip(places, arrived.split([held.length for held in places]), strict=True):
            _run(matrices[held.name].grad, held).copy_(piece)
        _orthogonalise(list(matrices.values()), group)
        back = [_run(matrices[held.name], held) for held in places]
        returned = self._swap(back, self._received_sizes, self._sizes)
        change = torch.zeros_like(update)
        for held, piece in zip(self._sent, returned.split([held.length for held in self._sent]), strict=True):
            change[held.offset : held.offset + held.length].copy_(piece)
        return change

    def _swap(self, pieces: list[Tensor], sizes: list[int], received_sizes: list[int]) -> Tensor:
        """Send consecutive `sizes` elements of the pieces to the ranks; what comes, on the device that computes."""
        device = self._world.device
        sent = torch.cat(pieces).to(device) if pieces else torch.empty(0, device=device)
        if self._world.size == 1:
            return sent
        received = torch.empty(sum(received_sizes), device=device)
        dist.all_to_all_single(received, sent, received_sizes, sizes)
        return received


def _orthogonalise(matrices: list[nn.Parameter], group: Mapping[str, Any]) -> None:
    """Put the update that its gradient alone gives into each matrix of zeros: torch's Muon without momentum and decay."""
    if matrices:
        names = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        options = {name: group[name] for name in names}
        torch.optim.Muon(matrices, momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()


def _run(tensor: Tensor | None, held: Held) -> Tensor:
    """The held elements of a whole matrix, a view."""
    assert tensor is not None
    return tensor.view(-1)[held.start : held.start + held.length]


def owners_of(shapes: Mapping[str, tuple[int, int]], ranks: int) -> dict[str, int]:
    """Matrix -> the rank that orthogonalises it: the dearest first, each to the rank that has the least to do so far."""

    def cost(name: str) -> int:  # products of [n, n] and [n, m] with n <= m
        return min(shapes[name]) ** 2 * max(shapes[name])

    load, owners = [0] * ranks, {}
    for name in sorted(shapes, key=lambda name: (-cost(name), name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += cost(name)
    return owners
