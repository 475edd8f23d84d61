"""FSDP2 and HSDP, torch's fully_shard, behind the Engine protocol.

The model is built on the meta device and each block becomes a unit of its own; embedding, last norm and head are the root's,
whose gathered weights are kept between the passes: the backward pass begins with them.
Weights are fp32 shards by rows; in bf16 each unit is cast while it is gathered, and gradients are reduced in fp32.

One process on a CPU has nothing to shard. Copies to and from fully_shard's buffers would take 4 to 10 % of a step's time,
so the module is used as it is, in bf16 with its weights cast for each forward pass (`computing_in_bf16`).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megagpt.config import UserError
from megagpt.distributed.device_timer import DeviceTimer
from megagpt.distributed.world import World
from megagpt.engine.autocast import computing_in_bf16
from megagpt.engine.base import Partition, Steps
from megagpt.engine.canonical import BlockNorm, Extent, OrderedReduceScatter, without_fused_kernels
from megagpt.engine.clipping import clip_and_update
from megagpt.engine.config import FSDPConfig, Precision
from megagpt.engine.dtypes import name_of, watch_formats
from megagpt.engine.fsdp_waits import measure_waits
from megagpt.engine.optim import STATES, OptimConfig, build_optimizer, create_states, parameter_groups, set_lr, set_updates
from megagpt.model.gpt import GPT


class FSDPEngine(Steps):
    """fully_shard. FSDP averages gradients over ranks, so the losses handed to `backward` are scaled up."""

    def __init__(
        self,
        make_model: Callable[[], GPT],
        optim: OptimConfig,
        config: FSDPConfig,
        world: World,
        *,
        precision: Precision,
        canonical: bool = False,
    ) -> None:
        with torch.device("meta"):
            module = make_model()
        mesh = device_mesh(config, world)
        # Inputs are not cast: a block gets its rotary angles in fp32, which bf16 would round by up to 16 at position 4,095.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32,
            cast_forward_inputs=False,
        )
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if config.cpu_offload
            else OffloadPolicy(),
        }
        recomputes_in_bf16 = precision == "bf16" and module.checkpoint_every > 0  # when the cast weights are gone
        several = world.size > 1 or world.device.type != "cpu"
        self._shards = several or config.cpu_offload or canonical or recomputes_in_bf16
        self._units: list[FSDPModule] = []
        if self._shards:
            self._units = [fully_shard(b, reshard_after_forward=config.reshard_after_forward, **options) for b in module.blocks]
            self._units.append(fully_shard(module, reshard_after_forward=False, **options))
        module.to_empty(device="cpu" if config.cpu_offload else world.device)
        if not self._shards and module.config.tied_head and not module.config.classes:
            module.head.weight = module.embedding.weight  # which to_empty parts, but for sharded parameters
        cast = precision == "bf16" and not self._shards
        self.model: Callable[..., Tensor] = computing_in_bf16(module) if cast else module
        self.module: GPT = module
        self.updates, self._world, self._mesh = 0, world, mesh
        self._optimizer = build_optimizer(parameter_groups(module, optim), optim)
        groups = self._optimizer.param_groups
        self._kinds = {parameter: group["kind"] for group in groups for parameter in group["params"]}
        create_states(self._optimizer, self._kinds.items())
        self.formats = watch_formats(module.last_layer, self._optimizer)
        self.formats["reductions"] = name_of(options["mp_policy"].reduce_dtype)
        self._reduces_each = config.accumulate == "sharded"
        self._sums: list[OrderedReduceScatter] = []
        self._canonical = canonical
        if canonical:
            self._add_in_order()
        on_gpus = world.device.type == "cuda" and world.size > 1
        self.collective_waits: DeviceTimer | None = DeviceTimer(world.device) if on_gpus else None
        if self.collective_waits is not None:
            measure_waits(self._units, self.collective_waits)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; they are reduced across ranks with the last micro-batch, accumulated in fp32 until then, or
        with each one (FSDPConfig.accumulate).

        In canonical order each micro-batch is reduced by itself, onto the sum of those before it.
        """
        if self._canonical:
            if self._world.size > 1:  # OrderedReduceScatter puts out whole sums; one rank alone does not call it
                self._optimizer.zero_grad()
            loss.backward()
            return
        if self._units:
            self._units[-1].set_requires_gradient_sync(last or self._reduces_each)  # of all units: the last one is the root
        (loss * self._world.size if self._world.size > 1 else loss).backward()

    def launch_step(self, lr: float, max_norm: float) -> Tensor:
        """Clip, update, zero."""
        set_lr(self._optimizer, lr)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if self._canonical:
            local = [gradient.to_local().flatten() for gradient in gradients if isinstance(gradient, DTensor)]
            norm = self._norm([gradient for gradient in local if len(gradient)])
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            with self.collective_waits() if self.collective_waits else contextlib.nullcontext():
                norm = norm.full_tensor()
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        result = clip_and_update(self._optimizer, local, norm, max_norm)
        self._optimizer.zero_grad()
        for unit in self._sums if self._world.size > 1 else ():
            unit.sum.take()
        return result.to(self._world.device, non_blocking=True)  # from a CPU with cpu_offload

    def _add_in_order(self) -> None:
        """Replace the reduction and the norm by those of megagpt.engine.canonical."""
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            self._sums.append(OrderedReduceScatter())
            unit.set_custom_reduce_scatter(self._sums[-1])  # type: ignore[arg-type]
        without_fused_kernels(self._optimizer)
        parameters = list(self.module.parameters())
        extents = [Extent(shard_start(p), p.to_local().numel(), p.numel()) for p in parameters if isinstance(p, DTensor)]
        held = [i for i, extent in enumerate(extents) if extent.length]
        self._norm = BlockNorm([extents[i] for i in held], [p.numel() for p in parameters], held, self._world)

    def state(self) -> dict[str, Partition]:
        """Partitions of this rank: rows of each parameter. With HSDP the copies share the writing."""
        for unit in self._units:  # a forward pass without a backward pass, an evaluation, leaves gathered weights
            unit.reshard()
        copy, copies = (self._mesh.get_local_rank(0), self._mesh.size(0)) if self._mesh.ndim == 2 else (0, 1)
        partitions, states = {}, self._optimizer.state
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            start, numel = shard_start(parameter) if self._shards else 0, parameter.numel()
            values = {"param": parameter.data, **{key: states[parameter][key] for key in STATES[self._kinds[parameter]]}}
            for key, value in values.items():
                local = (value.to_local() if isinstance(value, DTensor) else value).flatten()
                if len(local):
                    partitions[f"{key}.{name}"] = Partition(local, start, numel, copy, copies)
        return partitions

    def frozen(self) -> dict[str, Partition]:
        """This rank's rows of what is not trained; with HSDP and on one rank whole copies are such parts too."""
        for unit in self._units:
            unit.reshard()
        partitions = {}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                data = parameter.data
                local = (data.to_local() if isinstance(data, DTensor) else data).flatten()
                start = shard_start(parameter) if self._shards else 0
                if len(local):
                    partitions[f"param.{name}"] = Partition(local, start, parameter.numel())
        return partitions

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
