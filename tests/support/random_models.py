"""Random models of transformers, with every parameter away from its initial value, saved as a folder to import."""

from pathlib import Path
from typing import Any

import torch

from megagpt.model.gpt import GPT, ModelConfig, initialise

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = {"bos_token_id": None, "eos_token_id": 256}
MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def random_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model in fp32 and evaluation mode; `changes` are fields of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "gpt2":
        values = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
        values |= {"bos_token_id": 256, "eos_token_id": 256}
    else:
        values = {**SIZES, **HEADS, **IDS, **({"head_dim": 8} if model_type != "qwen2" else {})}
        values |= {"sliding_window": None} if model_type == "mistral" else {}
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if "norm" in name or "ln_" in name or name.endswith("bias") else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def save_source(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model's folder, with bytes as its tokenizer."""
    model.to(dtype).save_pretrained(folder)
    (folder / "bytes.tokenizer").touch()
    return folder


GPT_SIZES = {"vocab_size": 64, "seq_len": 48, "num_layers": 2, "num_heads": 4, "hidden_size": 32, "init_std": 0.2}
"""Of random_gpt."""


def random_gpt(**changes: Any) -> GPT:
    """A small model of ours, whose norms and biases are drawn too; `changes` of GPT_SIZES and of ModelConfig's other fields."""
    model = GPT(ModelConfig.model_validate({**GPT_SIZES, **changes}))
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()
