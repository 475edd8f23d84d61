"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from megagpt.config import Config


class ScheduleConfig(Config):
    """How the learning rate moves over the run."""

    kind: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """cosine (arXiv 1608.03983), wsd = warm-up, stable, decay (arXiv 2404.06395), linear, constant, or inverse_sqrt."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear growth from 0 to the peak."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: steps of linear decay at the end of the run."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate over the peak (cosine, linear, wsd)."""


class OptimConfig(Config):
    """Optimizer, learning rate, weight decay and clipping."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """adamw (arXiv 1711.05101) or sgd."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """adamw: decay of the first moment; sgd: momentum."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """adamw: decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw: added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices and embeddings; vectors (norms, biases) are never decayed."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 = no clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate moves."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.schedule.kind == "wsd" and self.schedule.decay_steps == 0:
            raise ValueError("schedule.kind=wsd needs schedule.decay_steps > 0")
        return self


def lr_at(config: OptimConfig, step: int, max_steps: int) -> float:
    """The learning rate of the update number `step` (from 0) in a run of `max_steps`."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.lr * (step + 1) / schedule.warmup_steps
    return config.lr * _decay(schedule, step, max_steps)


def _decay(schedule: ScheduleConfig, step: int, max_steps: int) -> float:
    """Share of the peak after the warm-up."""
    floor, after_warmup = schedule.min_lr_ratio, max(1, max_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / after_warmup)
    if schedule.kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "linear":
        return 1 - (1 - floor) * progress
    if schedule.kind == "wsd":
        into_decay = step - (max_steps - schedule.decay_steps)
        return 1 - (1 - floor) * min(1.0, max(0, into_decay) / schedule.decay_steps)
    if schedule.kind == "inverse_sqrt":
        return math.sqrt(max(1, schedule.warmup_steps) / max(1, step + 1))
    return 1.0


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups, decayed (two dimensions or more) and not decayed, in the model's order. Shapes are read before sharding."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if _ndim(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if _ndim(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The torch optimizer that `config` names, over `groups`."""
    return OPTIMIZERS[config.kind](groups, config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _sgd(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}

OPTIMIZER_STATES: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""The per-element states of each optimizer, by their names in torch's state dict; what the checkpoint keeps."""


def _ndim(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter; ZeRO-3 keeps its shape in ds_shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
