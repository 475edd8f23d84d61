"""DeepSpeed ZeRO behind the Engine protocol. The only module that imports deepspeed.

It uses DeepSpeed's internals for two things that its API does not offer: where each rank's fp32 weights and moments are
inside the flattened parameters (`state`), and rebuilding the working weights from them (`refresh`). The tested range of
versions is pinned, and tests/engine/test_parity.py and tests/checkpoint guard what is used here:
stages 1 and 2 `single_partition_of_fp32_groups`, `_hp_mapping`; bf16 stage 1 `fp32_groups_flat_partition`; stage 3
`fp32_partitioned_groups_flat`, `grad_position`, `fp16_partitioned_groups_flat`, `persistent_parameters`.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.distributed.fetch import fetched
from megagpt.distributed.world import World
from megagpt.engine.autocast import computing_in_bf16
from megagpt.engine.base import Partition, Steps
from megagpt.engine.canonical import BlockNorm, Extent, OrderedSum, clip_factor, without_fused_kernels
from megagpt.engine.config import DeepSpeedConfig, Precision
from megagpt.engine.dealt_matrices import DealtMatrices, Held
from megagpt.engine.dtypes import name_of, watch_formats
from megagpt.engine.optim import (
    OPTIMIZERS,
    STATES,
    OptimConfig,
    Together,
    build_optimizer,
    create_states,
    parameter_groups,
    set_lr,
    set_updates,
)
from megagpt.model.gpt import GPT


class DeepSpeedEngine(Steps):
    """ZeRO 0 to 3. Losses handed to `backward` are per-rank shares of one sum; DeepSpeed averages, so they are scaled up."""

    def __init__(
        self,
        make_model: Callable[[], GPT],
        optim: OptimConfig,
        config: DeepSpeedConfig,
        world: World,
        *,
        precision: Precision,
        micro_batch_size: int,
        canonical: bool = False,
    ) -> None:
        deepspeed = _import_deepspeed()
        options = {"precision": precision, "micro_batch_size": micro_batch_size}
        if config.zero_stage == 3:
            settings = deepspeed_settings(optim, config, world.size, **options)
            with deepspeed.zero.Init(config_dict_or_path=settings, enabled=True):
                module = make_model()
        else:
            module = make_model().to(world.device)
        alone = world.size == 1 and not canonical and config.zero_stage < 3 and not config.offload_optimizer
        cast = alone and precision == "bf16" and world.device.type == "cpu" and not module.checkpoint_every
        if alone and (precision == "fp32" or cast):
            # Stages 1 and 2 would copy all gradients and weights through flat buffers, 4 to 9 % of a step's time on a CPU.
            config = config.model_copy(update={"zero_stage": 0, "overlap_comm": False})
            options["precision"] = "fp32"  # DeepSpeed's bf16 is exact only from stage 1 on: computing_in_bf16 casts instead
        settings = deepspeed_settings(optim, config, world.size, **options)
        groups = parameter_groups(module, optim)
        dealt = OPTIMIZERS[optim.kind].matrices_only and config.zero_stage > 0
        optimizer = DealtMatrices(groups, optim) if dealt else build_optimizer(groups, optim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = optimizer.parts[0] if isinstance(optimizer, Together) else optimizer  # stage 0 is stepped here
            self._deepspeed: Any = deepspeed.initialize(model=module, optimizer=theirs, config=settings)[0]
        self.model: Callable[..., Tensor] = computing_in_bf16(self._deepspeed) if cast else self._deepspeed
        self.module: GPT = module
        self.updates = 0
        self._stage, self._world = config.zero_stage, world
        self._zero: Any = self._deepspeed.optimizer
        self._torch_optimizer = optimizer if config.zero_stage == 0 else self._zero.optimizer
        self._kinds = self._kinds_of_partitions(optimizer.param_groups)
        create_states(self._torch_optimizer, self._kinds.items())
        if isinstance(optimizer, DealtMatrices):
            optimizer.deal(self._held_matrices(optim.kind), world)
        self.formats = watch_formats(module.last_layer, self._torch_optimizer)
        self.formats["reductions"] = name_of(self._deepspeed.communication_data_type)
        self._canonical = _CanonicalZero1(self._zero, module, self._flat_partitions(), world) if canonical else None
        if self._canonical is not None:
            self.model = module  # the forward pass without the hooks that DeepSpeed adds for its own reduction
            without_fused_kernels(self._torch_optimizer)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; the reduction across ranks happens here (stages 2 and 3) or in `step`."""
        if self._canonical is not None:
            self._canonical.backward(loss)
            return
        self._deepspeed.backward(loss * self._world.size, scale_wrt_gas=False)

    def launch_step(self, lr: float, max_norm: float) -> Tensor:
        """Reduce what is left, clip, update, zero. DeepSpeed's own step fetches the norm and the overflow from the device."""
        set_lr(self._torch_optimizer, lr)
        if self._canonical is not None:
            return self._step_canonical(self._canonical, max_norm)
        return self._step_stage_0(max_norm) if self._stage == 0 else self._step_zero(max_norm)

    def state(self) -> dict[str, Partition]:
        """Partitions of this rank; see Partition."""
        partitions, states = {}, self._torch_optimizer.state
        for name, flat, offset, partition in self._fragments():
            partitions[f"param.{name}"] = partition
            for key in STATES[self._kinds[flat]]:
                view = states[flat][key].flatten().narrow(0, offset, len(partition.data))
                partitions[f"{key}.{name}"] = Partition(
                    view, partition.start, partition.numel, partition.copy, partition.copies
                )
        return partitions

    def frozen(self) -> dict[str, Partition]:
        """What is not trained: whole on every rank, from stage 3 on this rank's part; `refresh` gathers it."""
        partitions = {}
        parameter: Any
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                continue
            if self._stage < 3:
                partitions[f"param.{name}"] = Partition(parameter.data.flatten(), 0, parameter.numel())
                continue
            size = parameter.ds_tensor.numel()
            start = self._zero._get_param_partition_rank(parameter) * size
            length = min(size, parameter.ds_numel - start)  # the last partition is padded
            if length > 0:
                partitions[f"param.{name}"] = Partition(
                    parameter.ds_tensor.data.narrow(0, 0, length), start, parameter.ds_numel
                )
        return partitions

    def refresh(self, updates: int) -> None:
        """Copy fp32 weights into the working weights, gather them, and set Adam's step counts."""
        self.updates = updates
        set_updates(self._torch_optimizer, updates)
        if self._stage == 3:
            self._refresh_stage_3()
        elif self._stage > 0:
            self._zero.update_lp_params()

    def _step_zero(self, max_norm: float) -> Tensor:
        self._zero.clip_grad = max_norm
        self._deepspeed.step()
        norm = self._zero._global_grad_norm  # a number or a tensor, by stage
        grad_norm = fetched(norm.detach().reshape(1))[0] if isinstance(norm, Tensor) else float(norm)
        return self._told(grad_norm, not self._zero.overflow)

    def _told(self, grad_norm: float, applied: bool) -> Tensor:
        return torch.tensor([grad_norm, applied], dtype=torch.float64).to(self._world.device)

    def _step_stage_0(self, max_norm: float) -> Tensor:
        """DeepSpeed's stage 0 applies non-finite updates, so the norm is looked at here."""
        if self._world.size > 1:  # alone there is nothing to add, and it would copy all gradients twice
            self._deepspeed.buffered_allreduce_fallback()
        parameters = list(self.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
        (grad_norm,) = fetched(norm[None])
        applied = math.isfinite(grad_norm)
        if applied:
            self._torch_optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return self._told(grad_norm, applied)

    def _step_canonical(self, canonical: "_CanonicalZero1", max_norm: float) -> Tensor:
        """DeepSpeed's partitions, optimizer and gathering of weights, with our own reduction and norm."""
        norm = canonical.finish(max_norm)
        applied = math.isfinite(norm)
        if applied:
            self._torch_optimizer.step()
            self._zero.update_lp_params()
        for flat in self._flat_partitions():
            flat.grad = None
        return self._told(norm, applied)

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 tensors that the torch optimizer updates: a rank's partition of each group (stage 0: the parameters)."""
        if self._stage == 0:
            return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")  # ZeRO 1 and 2; bf16 with fp32 sums at 1
        return next(getattr(self._zero, name) for name in names if hasattr(self._zero, name))

    def _kinds_of_partitions(self, groups: list[dict[str, Any]]) -> dict[Tensor, str]:
        """Which optimizer updates each of them. Stage 3 empties the groups, and cuts large ones."""
        if self._stage == 3:
            numbers = self._zero.sub_group_to_group_id
            return {flat: groups[numbers[i]]["kind"] for i, flat in enumerate(self._flat_partitions())}
        return {parameter: group["kind"] for group in groups for parameter in group["params"]}

    def _held_matrices(self, kind: str) -> dict[Tensor, list[Held]]:
        """What this rank holds of the matrices that `kind` updates, by flat partition."""
        held: dict[Tensor, list[Held]] = {flat: [] for flat, of in self._kinds.items() if of == kind}
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        for name, flat, offset, partition in self._fragments():
            if flat in held:
                shape = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
                held[flat].append(Held(name, shape, offset, partition.start, len(partition.data)))
        return held

    def _fragments(self) -> Iterator[tuple[str, Tensor, int, Partition]]:
        """(parameter name, flat partition, offset in it, fp32 weight partition) of everything this rank holds."""
        partitions = self._flat_partitions()
        parameter: Any  # DeepSpeed sets attributes of its own on parameters
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 0:
                partition = Partition(parameter.data.flatten(), 0, parameter.numel(), self._world.rank, self._world.size)
                yield name, parameter, 0, partition
            elif self._stage == 3:
                group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self._zero._get_param_partition_rank(parameter) * length
                length = min(length, parameter.ds_numel - start)  # the last partition is padded
                if length > 0:
                    flat = partitions[group]
                    yield name, flat, offset, Partition(flat.data.narrow(0, offset, length), start, parameter.ds_numel)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat, place = partitions[mapping.param_group_index], mapping.hp_fragment_address
                data = flat.data.narrow(0, place.start, place.numel)
                yield name, flat, place.start, Partition(data, mapping.lp_fragment_address.start, parameter.numel())

    def _refresh_stage_3(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for i, flat in enumerate(zero.fp16_partitioned_groups_flat):
            flat.data.copy_(zero.fp32_partitioned_groups_flat[i].data)
            zero._unflatten_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


class _CanonicalZero1:
    """Gradients of ZeRO 1 in canonical order (megagpt.engine.canonical), put into `.grad` of DeepSpeed's flat partitions."""

    def __init__(self, zero: Any, module: nn.Module, partitions: list[Tensor], world: World) -> None:
        self._partitions, self._parameters = partitions, list(module.parameters())
        names = ("bit16_groups_flat", "bf16_groups_flat")  # all ranks' partitions of a group, one after the other
        whole = next(getattr(zero, name) for name in names if hasattr(zero, name))
        self._sums = [OrderedSum() for _ in partitions]
        self._places = [_place_in(whole, parameter) for parameter in self._parameters]
        extents, held = [], []
        self._gradients: list[tuple[int, int, int]] = []  # group, offset in its partition, elements
        for i, (parameter, (group, offset)) in enumerate(zip(self._parameters, self._places, strict=True)):
            size = len(partitions[group])
            begin = max(offset, world.rank * size)
            end = min(offset + parameter.numel(), (world.rank + 1) * size)
            if begin < end:
                held.append(i)
                extents.append(Extent(begin - offset, end - begin, parameter.numel()))
                self._gradients.append((group, begin - world.rank * size, end - begin))
        self._norm = BlockNorm(extents, [parameter.numel() for parameter in self._parameters], held, world)
        self._size = world.size

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; `.grad` of the parameters and DeepSpeed's hooks on it stay out of it."""
        gradients = torch.autograd.grad(loss, self._parameters)
        flats = [torch.zeros(self._size * len(part), dtype=torch.float32, device=part.device) for part in self._partitions]
        for gradient, (group, offset) in zip(gradients, self._places, strict=True):
            flats[group][offset : offset + gradient.numel()] = gradient.flatten()
        for total, flat in zip(self._sums, flats, strict=True):
            total.add(flat)

    def finish(self, max_norm: float) -> float:
        """Clip and hand over the gradients of the step; returns their norm before."""
        totals = [total.take() for total in self._sums]
        parts = [totals[group][offset : offset + length] for group, offset, length in self._gradients]
        (norm,) = fetched(self._norm(parts)[None])
        factor = clip_factor(norm, max_norm)
        for total, flat in zip(totals, self._partitions, strict=True):
            flat.grad = total.mul_(factor) if factor < 1 else total
        return norm


def _place_in(flats: list[Tensor], parameter: Tensor) -> tuple[int, int]:
    """(number, offset in elements) of the flat tensor whose memory holds a parameter."""
    for number, flat in enumerate(flats):
        offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= offset < flat.numel():
            return number, offset
    raise AssertionError("a parameter is outside of DeepSpeed's flat groups")


def deepspeed_settings(
    optim: OptimConfig, config: DeepSpeedConfig, size: int, *, precision: Precision, micro_batch_size: int
) -> dict[str, Any]:
    """DeepSpeed's JSON for our configuration."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "allgather_bucket_size": config.allgather_bucket_elements,
    }
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_optimizer:
        zero["offload_optimizer"] = offload
    if config.offload_parameters:
        zero["offload_param"] = offload
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": config.stage3_prefetch_elements,
            "stage3_max_live_parameters": config.stage3_max_live_elements,
            "stage3_param_persistence_threshold": config.stage3_persistence_elements,
            "zero_hpz_partition_size": config.hpz_partition_size,
        }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": micro_batch_size * size,
        "gradient_accumulation_steps": 1,  # unused: the loop decides when a step ends
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host as well
        "communication_data_type": config.reduce_dtype,
        "steps_per_print": None,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _import_deepspeed() -> Any:
    """deepspeed, quiet, and without the shared-memory op that it would compile at start-up on machines without a GPU."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # instead of a warning that there is no GPU
    # DeepSpeed still calls them by the names that torch 2.13 deprecates.
    names = r".*`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=names, category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed
