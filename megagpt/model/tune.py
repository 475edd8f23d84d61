"""Which parameters are trained: frozen ones by name or block, and LoRA adapters; applied from outside to a plain GPT.

LoRA (arXiv 2106.09685): the product with a frozen matrix W gets a trained term of low rank, x W^T + (alpha / rank) x A^T B^T.
The names of W and its bias stay, A and B are `<name of the layer>.lora_a` [rank, in] and `.lora_b` [out, rank].
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from megagpt.config import Config, UserError
from megagpt.model.gpt import GPT

LORA_A, LORA_B = "lora_a", "lora_b"
CLASS_HEAD = "score.weight"
"""The last layer of a classifier, which is always trained: a model to begin with need not have one."""


class LoraConfig(Config):
    """Adapters of low rank beside frozen matrices (arXiv 2106.09685)."""

    rank: int = Field(default=8, gt=0)
    """Columns of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """The term is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the adapters."""
    targets: tuple[str, ...] = ("attention.query", "attention.value")
    """Matrices of the blocks, by the end of their names or a pattern: attention.query, attention.*, mlp.out, *."""
    also_train: tuple[str, ...] = ()
    """Patterns of parameters that are trained in full beside the adapters; new special tokens need embedding.weight (and
    head.weight where tied_head=false)."""


class TuneConfig(Config):
    """Which parameters are trained; without a setting all are."""

    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are: embedding.*, blocks.*.mlp.*. Frozen weights have no optimizer states. The
    last layer of a classifier is trained all the same, so * leaves that alone."""
    freeze_blocks: int = Field(default=0, ge=0)
    """The embeddings and the first n blocks stay as they are."""
    lora: LoraConfig | None = None
    """Train adapters only; null = none."""

    @model_validator(mode="after")
    def _check(self) -> "TuneConfig":
        if self.lora is not None and (self.freeze or self.freeze_blocks):
            raise ValueError("freeze and freeze_blocks beside lora: it freezes everything but lora.also_train")
        return self

    @property
    def freezes(self) -> bool:
        """Whether some parameters are not trained."""
        return bool(self.freeze or self.freeze_blocks or self.lora)


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; all of its parameters are direct ones, so that engines gather them together."""

    def __init__(self, layer: nn.Linear, config: LoraConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.lora_a = nn.Parameter(torch.empty(config.rank, layer.in_features))
        self.lora_b = nn.Parameter(torch.empty(layer.out_features, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        dropped = F.dropout(input, self.dropout, self.training) if self.dropout else input
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(dropped, self.lora_a), self.lora_b) * self.scale


def prepare(model: GPT, tune: TuneConfig) -> None:
    """Put adapters into a model and freeze what is not trained. Raises UserError for a pattern that matches nothing."""
    if tune.lora is not None:
        for name in _targets(model, tune.lora):
            parent, _, leaf = name.rpartition(".")
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            setattr(model.get_submodule(parent), leaf, LoraLinear(layer, tune.lora))
    frozen = set(_frozen(model, tune))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("tune: every parameter is frozen, nothing would be trained")


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's factors."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of a factor as peft has it: B zero, A uniform within 1 / sqrt(in), from (seed, name)."""
    if name.endswith(LORA_B):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, config: LoraConfig) -> Tensor:
    """The one matrix that equals a layer and its adapter."""
    return weight + (lora_b @ lora_a) * (config.alpha / config.rank)


def _targets(model: GPT, config: LoraConfig) -> list[str]:
    names = [name for name, module in model.blocks.named_modules(prefix="blocks") if type(module) is nn.Linear]
    for pattern in config.targets:
        if not any(_ends_with(name, pattern) for name in names):
            known = sorted({".".join(name.split(".")[2:]) for name in names})
            raise UserError(f"tune.lora.targets={pattern!r}: matches no matrix of the blocks; there are {', '.join(known)}")
    return [name for name in names if any(_ends_with(name, pattern) for pattern in config.targets)]


def _ends_with(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _frozen(model: GPT, tune: TuneConfig) -> Iterator[str]:
    names = [name for name, _ in model.named_parameters() if name != CLASS_HEAD]
    if tune.lora is not None:
        _refuse_without_match("tune.lora.also_train", tune.lora.also_train, names)
        trained = tune.lora.also_train
        yield from (n for n in names if not is_adapter(n) and not any(fnmatchcase(n, pattern) for pattern in trained))
        return
    if tune.freeze_blocks > len(model.blocks):
        raise UserError(f"tune.freeze_blocks={tune.freeze_blocks}: the model has {len(model.blocks)} blocks")
    _refuse_without_match("tune.freeze", tune.freeze, names)
    first = ("embedding.", "positions.", *(f"blocks.{i}." for i in range(tune.freeze_blocks))) if tune.freeze_blocks else ()
    yield from (n for n in names if n.startswith(first) or any(fnmatchcase(n, pattern) for pattern in tune.freeze))


def _refuse_without_match(field: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{field}={pattern!r}: matches no parameter; there are {', '.join(names[:4])}, ...")
