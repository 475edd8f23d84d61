"""The blocks' matrix products in float8, by torchao: a Hopper GPU makes them up to twice as fast as bf16's (arXiv 2209.05433).

Weights, gradients and optimizer states keep their types; only the factors of each product are rounded to 8 bits, scaled so
that the largest element fits: by one scale per matrix (tensorwise), or one per row of either factor (rowwise: more exact, a
little slower). Embedding, norms and head stay as they are. On a CPU the products are emulated: the same rounding, no speed.
"""

import importlib.util
import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from megagpt.config import UserError
from megagpt.model.gpt import ModelConfig

Float8 = Literal["none", "tensorwise", "rowwise"]

MULTIPLE = 16
"""Rows and columns of the factors are multiples of it, by the hardware."""
CAPABILITY = (8, 9)
"""The first CUDA compute capability with float8 products (Ada; Hopper has 9.0)."""


def refuse_float8(kind: Float8, model: ModelConfig, precision: str, *, canonical: bool, seq_len: int | None = None) -> None:
    """Raise UserError where float8 products cannot be made: beside these settings, of these sizes, here.

    `seq_len`: tokens per sample, where known. A weight's gradient is summed over the tokens of a micro-batch, and the last
    micro-batch of a step may be of any number of samples.
    """
    if kind == "none":
        return
    if precision != "bf16":
        raise UserError(f"float8={kind} with precision={precision}: precision=bf16 is needed")
    if canonical:
        raise UserError(f"float8={kind} with determinism=canonical is not covered")
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"float8={kind} needs torchao: pip install -c constraints.txt '.[float8]'")
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.mlp_size": model.mlp_width,
        "model.num_heads x head size": model.num_heads * model.head_width,
        "model.num_kv_heads x head size": model.kv_heads * model.head_width,
        "data.seq_len": seq_len or MULTIPLE,
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise UserError(f"float8={kind}: {name} is {size}, a multiple of {MULTIPLE} is needed")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(), CAPABILITY))
        raise UserError(f"float8={kind}: {torch.cuda.get_device_name()} has compute capability {has}, {needs} is needed")


def use_float8(blocks: nn.Module, kind: Float8, *, emulate: bool) -> None:
    """Make every linear layer below `blocks` multiply in float8; parameters and their names stay the same."""
    torchao = _import_torchao()
    config = replace(torchao.Float8LinearConfig.from_recipe_name(kind), emulate=emulate)
    torchao.convert_to_float8_training(blocks, config=config, module_filter_fn=lambda module, _: isinstance(module, nn.Linear))


def _import_torchao() -> Any:
    """torchao.float8, without its warnings about kernels that this machine cannot load and float8 does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8
    finally:
        logging.disable(before)
    return torchao.float8
