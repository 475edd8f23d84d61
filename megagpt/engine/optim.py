"""Optimizers, parameter groups, and the learning rate as a pure function of the step.

To add an optimizer: a function that builds it and its row in OPTIMIZERS. The tests then step it, save and load it, and ask for
its settings in tests/support/toy.py and its name in docs/training.md.
"""

import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megagpt.config import Config, UserError


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The properties of an optimizer that engines and checkpoints need."""

    about: str
    """For the help of `optim.kind`."""
    build: Callable[..., torch.optim.Optimizer]
    """(parameter groups, settings) -> optimizer"""
    states: tuple[str, ...]
    """Its per-element states, by their names in torch's state dict: what the checkpoint keeps. Any other state (but the
    number of updates) would be lost."""
    updates_in: Literal["parameter", "group", "nowhere"] = "nowhere"
    """Where it keeps its number of updates, `step`: in the state of each parameter, in the group, or nowhere."""
    matrices_only: bool = False
    """It updates the matrices of the blocks as wholes, and adamw the rest."""
    state_dtype: torch.dtype = torch.float32
    """What its per-element states are kept in; checkpoints hold them in fp32, which is exact."""


def _adamw(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _adamw_bf16(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    from megagpt.engine.adamw_bf16 import AdamWBf16

    return AdamWBf16(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _sgd(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)


def _muon(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    """Keller Jordan et al. 2024; updates scaled to AdamW's size (arXiv 2502.16982), so that both share a learning rate."""
    return torch.optim.Muon(groups, lr=config.lr, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")


def _adabelief(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    from pytorch_optimizer import AdaBelief

    return AdaBelief(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec("adamw (arXiv 1711.05101)", _adamw, ("exp_avg", "exp_avg_sq"), "parameter"),
    "adamw_bf16_states": OptimizerSpec(
        "adamw_bf16_states (both moments in bf16, half their memory; beta1 and beta2 at most 0.96875)",
        _adamw_bf16,
        ("exp_avg", "exp_avg_sq"),
        "parameter",
        state_dtype=torch.bfloat16,
    ),
    "sgd": OptimizerSpec("sgd", _sgd, ("momentum_buffer",)),
    "muon": OptimizerSpec(
        "muon (hidden matrices orthogonalised, adamw for the rest)",
        _muon,
        ("momentum_buffer",),
        matrices_only=True,
    ),
    "adabelief": OptimizerSpec(
        "adabelief (arXiv 2010.07468; not with zero_stage 3)", _adabelief, ("exp_avg", "exp_avg_var"), "group"
    ),
}
"""Value of `optim.kind` -> the optimizer."""
STATES: dict[str, tuple[str, ...]] = {kind: spec.states for kind, spec in OPTIMIZERS.items()}
"""The per-element states of a group's kind."""
_KINDS: str = ", ".join(spec.about for spec in OPTIMIZERS.values()) + "."

if TYPE_CHECKING:
    OptimizerKind: TypeAlias = str
else:
    OptimizerKind = Literal[tuple(OPTIMIZERS)]


MAX_BF16_BETA = 1 - 2**-5
"""An average that moves by less than 1/32 of the difference a step is rounded back to where it was while they differ by an
eighth: half a unit of bf16 is 1/256."""


class ScheduleConfig(Config):
    """Learning-rate schedule over the run."""

    kind: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """cosine (arXiv 1608.03983), wsd = warm-up, stable, decay (arXiv 2404.06395), linear, constant, or inverse_sqrt."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear growth from 0 to the peak."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: steps of linear decay at the end of the run."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The learning rate at max_steps over the peak (cosine, linear, wsd); the last update is a step above it."""


class OptimConfig(Config):
    """Optimizer, learning rate, weight decay and clipping."""

    kind: OptimizerKind = Field(default="adamw", description=_KINDS)
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """adamw, adamw_bf16_states, adabelief: decay of the first moment; sgd: momentum."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """adamw, adamw_bf16_states, adabelief: decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw, adamw_bf16_states, adabelief: added to the root of the second moment."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: momentum of the hidden matrices."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices and embeddings; vectors (norms, biases) are never decayed."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 = no clipping."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Pattern of parameter names -> what their learning rate is multiplied by: {embedding.*: 0.1, score.weight: 10}. Of several
    patterns that match the first counts; 0 leaves weights as they are."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.schedule.kind == "wsd" and self.schedule.decay_steps == 0:
            raise ValueError("schedule.kind=wsd needs schedule.decay_steps > 0")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if OPTIMIZERS[self.kind].state_dtype == torch.bfloat16 and beta > MAX_BF16_BETA:
                raise ValueError(
                    f"kind={self.kind} needs {name} of at most {MAX_BF16_BETA}, not {beta}: slower averages stand still "
                    "in the 8 significant bits of bf16; kind=adamw keeps fp32"
                )
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


def lr_factor_of(config: OptimConfig, name: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    return next((factor for pattern, factor in config.lr_factors.items() if fnmatchcase(name, pattern)), 1.0)


def refuse_unmatched(config: OptimConfig, names: Iterable[str]) -> None:
    """Raise UserError for a pattern of `lr_factors` that counts for none of the parameters that are trained."""
    names = list(names)
    for number, pattern in enumerate(config.lr_factors):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        earlier = list(config.lr_factors)[:number]
        if not matched:
            raise UserError(
                f"optim.lr_factors: {pattern!r} matches no trained parameter; there are {', '.join(names[:4])}, ..."
            )
        if all(any(fnmatchcase(name, other) for other in earlier) for name in matched):
            raise UserError(f"optim.lr_factors: {pattern!r} has no effect: the patterns before it match all that it does")


def set_lr(optimizer: "Optimizer", lr: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of parameters in the model's order: decayed (two dimensions or more) and not decayed; for muon the matrices of the
    blocks are a group of their own. Shapes are read before sharding. `kind` in a group says which optimizer updates it. Each
    is split by `lr_factors`; `lr_factor` is a group's.
    """
    whole = OPTIMIZERS[config.kind].matrices_only
    kind = "adamw" if whole else config.kind
    kinds: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": config.weight_decay, "kind": config.kind},
        "decayed": {"weight_decay": config.weight_decay, "kind": kind},
        "plain": {"weight_decay": 0.0, "kind": kind},
    }
    factors = dict.fromkeys((1.0, *config.lr_factors.values()))
    groups = {
        (name, factor): {"params": [], **settings, **({"lr_factor": factor} if config.lr_factors else {})}
        for name, settings in kinds.items()
        for factor in factors
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _ndim(parameter) < 2:
            group = "plain"
        else:
            group = "matrices" if whole and name.startswith("blocks.") else "decayed"
        groups[group, lr_factor_of(config, name)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> "Optimizer":
    """The optimizer that `config` names, over `groups`."""
    spec = OPTIMIZERS[config.kind]
    if spec.matrices_only:
        kinds = (config.kind, "adamw")
        return Together([OPTIMIZERS[kind].build([g for g in groups if g["kind"] == kind], config) for kind in kinds])
    return spec.build(groups, config)


class Optimizer(Protocol):
    """The part of a torch optimizer that engines use."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """States by parameter."""
        ...

    def step(self) -> Any:
        """One update."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...


class Together:
    """Several optimizers that each update their own parameters."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._part_of = {parameter: part for part in parts for group in part.param_groups for parameter in group["params"]}

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """The state of each parameter, in the part that updates it."""
        return {parameter: part.state[parameter] for parameter, part in self._part_of.items()}

    def step(self) -> None:
        """One update of each part."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()


def create_states(optimizer: Optimizer, parameters: Iterable[tuple[Tensor, str]]) -> None:
    """Create the states that torch would create in the first step, for (parameter, kind): a load needs them earlier."""
    state_of = optimizer.state
    for parameter, kind in parameters:
        state = state_of[parameter]
        dtype = OPTIMIZERS[kind].state_dtype
        state.update({key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key in STATES[kind]})
        if OPTIMIZERS[kind].updates_in == "parameter":
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def set_updates(optimizer: Optimizer, updates: int) -> None:
    """Tell the optimizer how many updates it has made, for its bias correction."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
    for group in optimizer.param_groups:
        if "kind" in group and OPTIMIZERS[group["kind"]].updates_in == "group":
            group["step"] = updates


def _ndim(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter; ZeRO-3 keeps its shape in ds_shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
