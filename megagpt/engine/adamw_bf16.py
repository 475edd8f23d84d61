"""AdamW (arXiv 1711.05101) whose moments are kept in bf16 and computed in fp32, in slices, so that little is held beside them.

Each operation is rounded by itself, none is fused with another, so that the result does not depend on how elements are cut
into tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SLICE = 1 << 22
"""Elements that are in fp32 at a time."""
SCRATCH_BYTES = 12
"""Bytes that an update takes for each of them: both moments in fp32, and a product."""


class AdamWBf16(torch.optim.Optimizer):
    """AdamW with `exp_avg` and `exp_avg_sq` in bf16; `step` as in torch's AdamW, a number per parameter."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        correction = (1 - beta2 ** state["step"]).sqrt()
        flat = [_flat(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        for weight, gradient, first, second in zip(*(tensor.split(SLICE) for tensor in flat), strict=True):
            gradient = gradient.float()
            average = first.float().mul_(beta1).add_(gradient * (1 - beta1))
            square = second.float().mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
            first.copy_(average)
            second.copy_(square)
            change = average.mul_(step_size).div_(square.sqrt_().div_(correction).add_(group["eps"]))
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)


def _flat(tensor: Tensor | None) -> Tensor:
    """The elements of this rank as one dimension, in the same memory."""
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
