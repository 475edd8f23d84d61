"""Clipping and the decision to leave an update out: on the device where the optimizer can, else on the host. Same bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megagpt.distributed.fetch import fetched
from megagpt.engine.canonical import clip_factor
from megagpt.engine.optim import Optimizer


def clip_and_update(optimizer: Optimizer, gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> Tensor:
    """Scale gradients of global norm `norm` (0-D) to `max_norm` (0 = no clipping) and update, unless the norm is not finite.

    Returns fp64 [2] on the device of the norm: the norm, and 1 if the update was applied, else 0. Nothing is fetched from the
    device if `decides_on_device` holds.
    """
    if decides_on_device(optimizer):
        return _on_device(optimizer, gradients, norm, max_norm)
    (grad_norm,) = fetched(norm[None])
    applied = math.isfinite(grad_norm)
    if applied:
        factor = clip_factor(grad_norm, max_norm)
        if factor < 1:
            torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]
        optimizer.step()
    return torch.tensor([grad_norm, applied], dtype=torch.float64).to(norm.device)


def decides_on_device(optimizer: Optimizer) -> bool:
    """Whether all of the optimizer is torch's fused AdamW, which leaves weights, moments and step counts as they are when its
    `found_inf` is 1 on the device."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


def _on_device(optimizer: Any, gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> Tensor:
    norm64, finite = norm.double(), norm.isfinite()
    if max_norm > 0 and gradients:  # clip_factor's arithmetic, rounded as a Python number is that multiplies an fp32 tensor
        factor = (max_norm / (norm64 + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
    return torch.stack([norm64, finite.double()])
