"""FSDP2 and HSDP, torch's fully_shard, behind the Engine protocol.

The model is built on the meta device and each block becomes a unit of its own; embedding, last norm and head are the root's.
Weights are fp32 shards by rows; in bf16 each unit is cast while it is gathered, and gradients are reduced in fp32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megagpt.config import UserError
from megagpt.engine import FlatPiece, FSDPConfig, Precision, StepResult
from megagpt.model import GPT
from megagpt.optim import STATES, OptimConfig, build_optimizer, create_states, parameter_groups, set_updates
from megagpt.world import World


class FSDPEngine:
    """fully_shard. FSDP averages gradients over ranks, so the losses handed to `backward` are scaled up."""

    def __init__(
        self, make_model: Callable[[], GPT], optim: OptimConfig, config: FSDPConfig, world: World, *, precision: Precision
    ) -> None:
        with torch.device("meta"):
            module = make_model()
        mesh = device_mesh(config, world)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": config.reshard_after_forward,
            "mp_policy": policy if precision == "bf16" else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if config.cpu_offload
            else OffloadPolicy(),
        }
        for block in module.blocks:
            fully_shard(block, **options)
        fully_shard(module, **options)
        module.to_empty(device="cpu" if config.cpu_offload else world.device)
        self.model: Callable[..., Tensor] = module
        self.module: nn.Module = module
        self._root: FSDPModule = module  # type: ignore[assignment]
        self.updates, self._world, self._mesh = 0, world, mesh
        self._optimizer = build_optimizer(parameter_groups(module, optim), optim)
        groups = self._optimizer.param_groups
        self._kinds = {parameter: group["kind"] for group in groups for parameter in group["params"]}
        create_states(self._optimizer, self._kinds.items())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; they are reduced across ranks with the last micro-batch, accumulated in fp32 until then."""
        self._root.set_requires_gradient_sync(last)
        (loss * self._world.size).backward()

    def step(self, lr: float, max_norm: float) -> StepResult:
        """Clip, update, zero."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        applied = math.isfinite(grad_norm)
        if applied:
            if max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self._optimizer.step()
            self.updates += 1
        self._optimizer.zero_grad()
        return StepResult(grad_norm, applied)

    def state(self) -> dict[str, FlatPiece]:
        """Pieces of this rank: rows of each parameter. With HSDP the copies share the writing."""
        copy, copies = (self._mesh.get_local_rank(0), self._mesh.size(0)) if self._mesh.ndim == 2 else (0, 1)
        pieces, states = {}, self._optimizer.state
        for name, parameter in self.module.named_parameters():
            start, numel = shard_start(parameter), parameter.numel()
            values = {"param": parameter.data, **{key: states[parameter][key] for key in STATES[self._kinds[parameter]]}}
            for key, value in values.items():
                local = value.to_local().flatten()
                if len(local):
                    pieces[f"{key}.{name}"] = FlatPiece(local, start, numel, copy, copies)
        return pieces

    def refresh(self, updates: int) -> None:
        """Set Adam's step counts; the working weights are made from the shards at each use."""
        self.updates = updates
        set_updates(self._optimizer, updates)


def device_mesh(config: FSDPConfig, world: World) -> DeviceMesh:
    """One dimension over all ranks, or (copies, shards) with `shard_size` < ranks. Raises UserError if they do not divide."""
    kind = world.device.type
    if config.shard_size is None or config.shard_size == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    if world.size % config.shard_size:
        raise UserError(f"engine.shard_size={config.shard_size} does not divide the {world.size} ranks")
    shape = (world.size // config.shard_size, config.shard_size)
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))


def shard_start(parameter: Tensor) -> int:
    """Offset of this rank's rows in the flattened parameter."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    rank, size = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    rows_per_rank = -(-parameter.shape[0] // size)  # torch.chunk's rule
    row_elements = parameter.numel() // parameter.shape[0]
    return min(rank * rows_per_rank, parameter.shape[0]) * row_elements
