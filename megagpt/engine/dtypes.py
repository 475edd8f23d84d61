"""The data types of weights, gradients, reductions and optimizer states: as declared, and as found in the tensors."""

from typing import Any, TypeAlias

import torch
from torch import nn

from megagpt.config import Failure
from megagpt.engine.config import EngineConfig, Precision
from megagpt.engine.optim import OPTIMIZERS, OptimConfig, Together

Formats: TypeAlias = dict[str, str]
"""fp32, bf16 ... of weights (those that compute), master_weights (those that are updated), gradients (as the optimizer gets
them), optimizer_states, reductions (sums of gradients over ranks) and loss."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def declared_formats(precision: Precision, engine: EngineConfig, optim: OptimConfig) -> Formats:
    """The formats that the settings promise."""
    fp32 = dict.fromkeys(("master_weights", "gradients", "loss"), "fp32")
    states = name_of(OPTIMIZERS[optim.kind].state_dtype)
    return {"weights": precision, **fp32, "optimizer_states": states, "reductions": engine.reduce_dtype}


def check_formats(declared: Formats, found: Formats) -> None:
    """Raise Failure naming everything that has another format than declared."""
    wrong = [f"{key} are {found.get(key)} instead of {name}" for key, name in declared.items() if found.get(key) != name]
    if wrong:
        raise Failure(f"precision: {'; '.join(wrong)}")


def watch_formats(head: nn.Module, optimizer: Any) -> Formats:
    """A dict that the first forward pass and the first update fill with the formats of their tensors."""
    found: Formats = {}
    parts = optimizer.parts if isinstance(optimizer, Together) else [optimizer]

    def at_forward(module: Any, inputs: Any) -> None:
        found["weights"] = name_of(module.weight.dtype)
        hook.remove()

    def at_update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        values = [value for p in parameters for value in optimizer.state[p].values()]
        states = [value for value in values if isinstance(value, torch.Tensor) and value.numel() > 1]  # not step counts
        for key, tensors in (
            ("master_weights", parameters),
            ("gradients", [p.grad for p in parameters]),
            ("optimizer_states", states),
        ):
            names = {name_of(tensor.dtype) for tensor in tensors} | set(found.get(key, "").split("+")) - {""}
            found[key] = "+".join(sorted(names))
        hooks.pop(optimizer).remove()

    hook = head.register_forward_pre_hook(at_forward)
    hooks = {optimizer: optimizer.register_step_pre_hook(at_update) for optimizer in parts}
    return found


def name_of(dtype: torch.dtype) -> str:
    """fp32 for torch.float32 and so on."""
    return _NAMES.get(dtype, str(dtype))
