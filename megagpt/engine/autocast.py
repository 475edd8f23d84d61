"""bf16 for one process on a CPU, which shards nothing: no engine's copies of all weights and gradients are needed there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def computing_in_bf16(module: nn.Module) -> Callable[..., Tensor]:
    """`module` with bf16 weights made of its fp32 ones at each call; gradients arrive, and are added up, in fp32."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        weights = {name: parameter.bfloat16() for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, weights, args, kwargs)

    return call
