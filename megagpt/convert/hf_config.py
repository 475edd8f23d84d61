"""config.json (transformers 4.x and 5.x) to ModelConfig and back: what is read, what must be one value; the rest is refused."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.config import UserError, validate
from megagpt.model.gpt import ModelConfig

HARMLESS = frozenset(
    """_name_or_path _attn_implementation _attn_implementation_autoset architectures attention_dropout attn_pdrop bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id predict_past prefix pretraining_tp problem_type remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache""".split()  # noqa: SIM905
)
"""Settings that do not change logits."""

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a family's config.json is read and written."""

    read: Callable[[Values, int | None], ModelConfig]
    """config.json (and a shorter seq_len, if asked) to ModelConfig. Raises UserError that names field, value and rule."""
    write: Callable[[ModelConfig, int], dict[str, Any]]
    """ModelConfig and the number of embedding rows to config.json, without the fields that every family has."""


def rotary_settings(model_type: str, *, qkv_bias: bool = False, qk_norm: bool = False) -> Settings:
    """Llama and its relatives."""

    def read(values: Values, seq_len: int | None) -> ModelConfig:
        heads = _number(values, "num_attention_heads")
        positions = _number(values, "max_position_embeddings")
        length = seq_len or positions
        if length > positions:
            raise UserError(f"seq_len={length}: config.json: max_position_embeddings={positions}")
        known = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        known |= {"num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
        known |= {"rope_parameters", "rope_theta", "rope_scaling", "sliding_window", "use_sliding_window"}
        known |= {"max_window_layers", "layer_types"}
        fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
        _refuse_others(values, known, fixed)
        _refuse_windows(values, model_type, length)
        theta, scaling = read_rope(values)
        config = {
            "family": "llama",
            "vocab_size": _number(values, "vocab_size"),
            "seq_len": length,
            "num_layers": _number(values, "num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "hidden_size": _number(values, "hidden_size"),
            "head_size": values.get("head_dim") or (128 if model_type == "qwen3" else None),
            "mlp_size": _number(values, "intermediate_size"),
            "tied_head": values.get("tie_word_embeddings", False),
            "qk_norm": qk_norm,
            "qkv_bias": qkv_bias,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": values.get("rms_norm_eps", 1e-6),
        }
        return validate(ModelConfig, config, source="config.json")

    def write(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": config.seq_len,
            "initializer_range": config.init_std,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_head,
            "attention_dropout": 0.0,
            **({} if model_type == "qwen2" else {"attention_bias": False}),
            **({"mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False, "sliding_window": None}),
            **write_rope(config),
        }

    return Settings(read, write)


def gpt2_settings() -> Settings:
    """GPT-2."""

    def read(values: Values, seq_len: int | None) -> ModelConfig:
        positions = _number(values, "n_positions")
        if seq_len not in (None, positions):
            raise UserError(f"seq_len={seq_len}: a gpt2 has n_positions={positions} learned positions")
        known = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"}
        fixed = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        _refuse_others(values, known | {"tie_word_embeddings"}, fixed | {"add_cross_attention": False})
        config = {
            "family": "gpt2",
            "vocab_size": _number(values, "vocab_size"),
            "seq_len": positions,
            "num_layers": _number(values, "n_layer"),
            "num_heads": _number(values, "n_head"),
            "hidden_size": _number(values, "n_embd"),
            "mlp_size": values.get("n_inner") or 4 * _number(values, "n_embd"),
            "tied_head": values.get("tie_word_embeddings", True),
            "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        }
        return validate(ModelConfig, config, source="config.json")

    def write(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {
            "vocab_size": vocab_size,
            "n_positions": config.seq_len,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_head,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }

    return Settings(read, write)


def read_rope(values: Values) -> tuple[float, dict[str, Any] | None]:
    """Base of the rotary frequencies and our rope_scaling, from rope_parameters (5.x) or rope_theta and rope_scaling (4.x)."""
    newer = values.get("rope_parameters")
    section = dict(newer if newer is not None else values.get("rope_scaling") or {})
    theta = section.pop("rope_theta", values.get("rope_theta", 10000.0))
    kinds = {section.pop(name) for name in ("rope_type", "type") if name in section} or {"default"}
    where = "rope_parameters" if newer is not None else "rope_scaling"
    if len(kinds) > 1:
        raise UserError(f"config.json: {where}: rope_type and type differ: {sorted(kinds)}")
    kind = kinds.pop()
    if kind not in _ROPE_FIELDS:
        raise UserError(f"config.json: {where}.rope_type={kind!r}: {', '.join(_ROPE_FIELDS)} are known")
    scaling = {ours: section.pop(theirs) for theirs, ours in _ROPE_FIELDS[kind].items() if section.get(theirs) is not None}
    fixed: dict[str, Any] = {"partial_rotary_factor": 1.0}
    if kind == "default":
        fixed |= {"factor": 1.0, "original_max_position_embeddings": values.get("max_position_embeddings")}
    if kind == "yarn":
        fixed |= {"truncate": True, "attention_factor": 0.1 * math.log(scaling.get("factor", 1)) + 1.0}
    for name, value in section.items():
        if value is not None and not (name in fixed and value == fixed[name]):
            raise UserError(f"config.json: {where}.{name}={value!r}: not known for rope_type={kind}")
    return theta, None if kind == "default" else {"kind": kind, **scaling}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """rope_parameters for transformers 5.x, and rope_theta and rope_scaling, which 4.x reads."""
    section: dict[str, Any] = {"rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        values = scaling.model_dump()
        section = {"rope_type": scaling.kind} | {theirs: values[ours] for theirs, ours in _ROPE_FIELDS[scaling.kind].items()}
    return {
        "rope_parameters": {**section, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {**section, "rope_theta": config.rope_theta},
    }


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow")
_ROPE_FIELDS = {
    kind: {name: name.replace("max_position_embeddings", "seq_len") for name in names}
    for kind, names in {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", *_LLAMA3),
        "yarn": ("factor", *_YARN),
    }.items()
}
"""Their fields of each rope_type, and ours."""


def _refuse_others(values: Values, known: set[str], fixed: Values) -> None:
    """Raise UserError on a setting that is not known, or has another value than the one that model.py computes."""
    for name, value in values.items():
        if name in known or name in HARMLESS:
            continue
        if name in fixed:
            if value is not None and value != fixed[name]:
                raise UserError(f"config.json: {name}={value!r}: only {fixed[name]!r} can be converted")
        elif value not in (None, False, {}, []):
            raise UserError(f"config.json: {name}={value!r}: this setting is not known here and may change what is computed")


def _refuse_windows(values: Values, model_type: str, seq_len: int) -> None:
    """Raise UserError if some layer does not see all tokens before it."""
    used = values.get("use_sliding_window", model_type == "mistral") or model_type in ("mistral", "llama")
    window = values.get("sliding_window", 4096 if model_type == "mistral" else None)
    if used and window is not None and window < seq_len:
        raise UserError(
            f"config.json: sliding_window={window} is less than the {seq_len} tokens of the model: attention would not see all "
            f"of them; seq_len={window} imports it for sequences that the window covers"
        )
    others = sorted({kind for kind in values.get("layer_types") or () if kind != "full_attention"})
    if others and window is not None and window < seq_len:
        raise UserError(f"config.json: layer_types: {', '.join(others)}: only full_attention can be converted")


def _number(values: Values, name: str) -> int:
    value = values.get(name)
    if type(value) is not int:
        raise UserError(f"config.json: {name}={value!r}: a number is expected")
    return value
