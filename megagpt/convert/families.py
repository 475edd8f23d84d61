"""Model families of Hugging Face's transformers: one table of tensors and one of settings per family, for both directions.

A table row is a tensor of theirs and the tensors of ours that it holds, joined along their rows; GPT-2's Conv1D keeps its
matrices transposed. `plan_tensors` opens the table for one model and proves that every parameter is used once. What a family
computes that megagpt/model/gpt.py does not is refused by name, as is every setting that this file does not know.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.config import UserError
from megagpt.convert.hf_config import Settings, gpt2_settings, rotary_settings
from megagpt.engine.build import whole_shapes
from megagpt.model.gpt import ModelConfig

CLASSIFIER = "ForSequenceClassification"
"""How transformers' classes end that score a sequence at its last token, by a layer `score` without bias."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of theirs. `{i}` is the block's number."""

    theirs: str
    ours: tuple[str, ...]
    """Joined along their first axis."""
    transposed: bool = False
    """Stored as [in, out]."""
    when: Callable[[ModelConfig], bool] = lambda config: True


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of transformers."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    """In the order of computation: a tensor that is wrong shows first where it is first used."""
    settings: Settings
    """config.json to ModelConfig and back."""
    prefix: str = ""
    """What names may lack: the base model saved without its head."""
    ignored: tuple[str, ...] = ()
    """Ends of names of buffers that are computed, not learned."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of theirs in one model."""

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    """As it is stored."""
    transposed: bool
    kind: str
    """The name with `*` for the block's number."""


def plan_tensors(family: Family, config: ModelConfig, vocab_size: int | None = None) -> list[Planned]:
    """Every tensor of theirs for this model; with `vocab_size` embedding and head have that many rows.

    Raises RuntimeError if a parameter of ours is used twice or not at all: a mistake in the table.
    """
    shapes = {name: list(shape) for name, shape in whole_shapes(config).items()}
    for name in ("embedding.weight", "head.weight"):
        if name in shapes and vocab_size is not None:
            shapes[name][0] = vocab_size
    planned: list[Planned] = []
    used: list[str] = []
    for theirs, ours, row in _opened(family.rows, config):
        used += ours
        if any(name not in shapes for name in ours):
            raise RuntimeError(f"{family.model_type}: {theirs} names {ours}, the model has no such parameter")
        shape = [sum(shapes[name][0] for name in ours), *shapes[next(iter(ours))][1:]]
        stored = tuple(reversed(shape) if row.transposed else shape)
        planned.append(Planned(theirs, ours, stored, row.transposed, row.theirs.replace("{i}", "*")))
    if sorted(used) != sorted(shapes):
        wrong = sorted({name for name in [*used, *shapes] if used.count(name) != 1 or name not in shapes})
        raise RuntimeError(f"{family.model_type}: its table uses these parameters twice or never: {', '.join(wrong)}")
    return planned


def join(planned: Planned, parts: Mapping[str, Tensor]) -> Tensor:
    """Their tensor from ours."""
    found = [parts[name] for name in planned.ours]
    whole = torch.cat(found) if len(found) > 1 else found[0]
    return whole.t().contiguous() if planned.transposed else whole


def split(planned: Planned, tensor: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Our tensors from theirs; `rows` are the sizes of their first axes."""
    whole = tensor.t() if planned.transposed else tensor
    parts = whole.split([rows[name] for name in planned.ours])
    return {name: part.contiguous() for name, part in zip(planned.ours, parts, strict=True)}


def family_of(model_type: str) -> Family:
    """The family of that `model_type`. Raises UserError that says why another cannot be converted."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type, f"not known; {', '.join(FAMILIES)} are")
    raise UserError(f"model_type={model_type!r}: {reason}")


def architecture_of(family: Family, config: ModelConfig) -> str:
    """The class of transformers that computes a model of this family."""
    if not config.classes:
        return family.architecture
    return family.architecture.replace("ForCausalLM", CLASSIFIER).replace("LMHeadModel", CLASSIFIER)


def family_for(config: ModelConfig) -> Family:
    """The family in which a model of ours is exported. Raises UserError if none computes what it does."""
    if config.family == "gpt2":
        if config.qk_norm or config.kv_heads != config.num_heads or config.head_width * config.num_heads != config.hidden_size:
            raise UserError(
                f"family=gpt2 with qk_norm={config.qk_norm}, num_kv_heads={config.num_kv_heads}, "
                f"head_size={config.head_size}: GPT2LMHeadModel has none of these"
            )
        return FAMILIES["gpt2"]
    if config.qk_norm and config.qkv_bias:
        raise UserError("qk_norm=true with qkv_bias=true: no family of transformers that is known here has both")
    return FAMILIES["qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"]


def _opened(rows: Iterable[Row], config: ModelConfig) -> Iterable[tuple[str, tuple[str, ...], Row]]:
    """Names of theirs and ours: rows of blocks stand together and are repeated per block."""
    rows = [row for row in rows if row.when(config)]
    of_blocks = [row for row in rows if "{i}" in row.theirs]
    first = rows.index(of_blocks[0])
    for row in rows[:first]:
        yield row.theirs, row.ours, row
    for i in range(config.num_layers):
        for row in of_blocks:
            yield row.theirs.format(i=i), tuple(name.format(i=i) for name in row.ours), row
    for row in rows[first + len(of_blocks) :]:
        yield row.theirs, row.ours, row


def _untied(config: ModelConfig) -> bool:
    return not config.tied_head and not config.classes


def _classifies(config: ModelConfig) -> bool:
    return bool(config.classes)


def _normed(config: ModelConfig) -> bool:
    return config.qk_norm


def _biased(config: ModelConfig) -> bool:
    return config.qkv_bias


_BLOCK, _OURS = "model.layers.{i}.", "blocks.{i}."
_ROTARY = (
    Row("model.embed_tokens.weight", ("embedding.weight",)),
    Row(_BLOCK + "input_layernorm.weight", (_OURS + "attention_norm.weight",)),
    Row(_BLOCK + "self_attn.q_proj.weight", (_OURS + "attention.query.weight",)),
    Row(_BLOCK + "self_attn.q_proj.bias", (_OURS + "attention.query.bias",), when=_biased),
    Row(_BLOCK + "self_attn.q_norm.weight", (_OURS + "attention.query_norm.weight",), when=_normed),
    Row(_BLOCK + "self_attn.k_proj.weight", (_OURS + "attention.key.weight",)),
    Row(_BLOCK + "self_attn.k_proj.bias", (_OURS + "attention.key.bias",), when=_biased),
    Row(_BLOCK + "self_attn.k_norm.weight", (_OURS + "attention.key_norm.weight",), when=_normed),
    Row(_BLOCK + "self_attn.v_proj.weight", (_OURS + "attention.value.weight",)),
    Row(_BLOCK + "self_attn.v_proj.bias", (_OURS + "attention.value.bias",), when=_biased),
    Row(_BLOCK + "self_attn.o_proj.weight", (_OURS + "attention.out.weight",)),
    Row(_BLOCK + "post_attention_layernorm.weight", (_OURS + "mlp_norm.weight",)),
    Row(_BLOCK + "mlp.gate_proj.weight", (_OURS + "mlp.gate.weight",)),
    Row(_BLOCK + "mlp.up_proj.weight", (_OURS + "mlp.up.weight",)),
    Row(_BLOCK + "mlp.down_proj.weight", (_OURS + "mlp.out.weight",)),
    Row("model.norm.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head.weight",), when=_untied),
    Row("score.weight", ("score.weight",), when=_classifies),
)


def _gpt2_rows() -> tuple[Row, ...]:
    block, qkv = "transformer.h.{i}.", ("query", "key", "value")
    modules = (
        ("transformer.wte", ("embedding",), ("weight",), False),
        ("transformer.wpe", ("positions",), ("weight",), False),
        (block + "ln_1", (_OURS + "attention_norm",), ("weight", "bias"), False),
        (block + "attn.c_attn", tuple(f"{_OURS}attention.{name}" for name in qkv), ("weight", "bias"), True),
        (block + "attn.c_proj", (_OURS + "attention.out",), ("weight", "bias"), True),
        (block + "ln_2", (_OURS + "mlp_norm",), ("weight", "bias"), False),
        (block + "mlp.c_fc", (_OURS + "mlp.up",), ("weight", "bias"), True),
        (block + "mlp.c_proj", (_OURS + "mlp.out",), ("weight", "bias"), True),
        ("transformer.ln_f", ("norm",), ("weight", "bias"), False),
    )
    rows = [
        Row(f"{theirs}.{end}", tuple(f"{name}.{end}" for name in ours), transposed=conv1d and end == "weight")
        for theirs, ours, ends, conv1d in modules
        for end in ends
    ]
    score = Row("score.weight", ("score.weight",), when=_classifies)
    return (*rows, Row("lm_head.weight", ("head.weight",), when=_untied), score)


def _rotary(model_type: str, architecture: str, **fixed: Any) -> Family:
    settings = rotary_settings(model_type, **fixed)
    return Family(model_type, architecture, _ROTARY, settings, "model.", ("rotary_emb.inv_freq",))


FAMILIES = {
    "gpt2": Family(
        "gpt2", "GPT2LMHeadModel", _gpt2_rows(), gpt2_settings(), "transformer.", (".attn.bias", ".attn.masked_bias")
    ),
    "llama": _rotary("llama", "LlamaForCausalLM"),
    "mistral": _rotary("mistral", "MistralForCausalLM"),
    "qwen2": _rotary("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _rotary("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}
"""By `model_type`."""

REFUSED = {
    "gemma": "it scales the embedding by sqrt(hidden_size), its norms multiply by 1 + weight, its MLP gates with GELU",
    "gemma2": "it caps logits, has norms behind attention and MLP, and local attention in every other layer",
    "gemma3_text": "it has norms behind attention and MLP, and local attention in most layers",
    "smollm3": "it leaves out rotary positions in some layers (no_rope_layers)",
    "phi3": "its queries, keys and values are one tensor, and it rotates a part of each head",
    "mixtral": "its MLP is a mixture of experts",
    "qwen2_moe": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
    "olmo2": "its norms come behind attention and MLP",
    "gpt_neox": "attention and MLP of a block are computed from the same input",
}
"""Well-known families that model.py does not compute, and why."""
