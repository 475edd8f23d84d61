"""Models that need not fit in memory: each module's weights are read as it is called and dropped behind it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.convert.compare_logits import auto_class, import_transformers
from megagpt.convert.weight_files import WeightFolder
from megagpt.model.gpt import GPT, ModelConfig


def stream_weights(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Let a model on the meta device compute: `read(name)` gives a parameter, whole, in any type, each time it is needed.

    Only modules that are called hold weights, so at most one module's are in memory.
    """
    for prefix, module in model.named_modules():
        if module._parameters:
            _stream_module(module, prefix, read)


def streamed_gpt(config: ModelConfig, read: Callable[[str], Tensor]) -> GPT:
    """Our model in evaluation mode; a tied head reads `embedding.weight`."""
    with torch.device("meta"):
        model = GPT(config)
    aliases = {"head.weight": "embedding.weight"} if config.tied_head and not config.classes else {}
    stream_weights(model, lambda name: read(aliases.get(name, name)))
    return model.eval()


def streamed_reference(folder: Path) -> nn.Module:
    """An export as transformers computes it, in fp32 on the CPU, its weights read from the folder's safetensors files."""
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = auto_class(folder).from_config(config, dtype=torch.float32)
    if hasattr(model.base_model, "rotary_emb"):  # its table is computed, not read
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config)
    weights = WeightFolder(folder)
    names = _names(model, weights.tensors)
    stream_weights(model, lambda name: weights.read(names[name]))
    return model.eval()


def _names(model: Any, stored: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> its name on disk: of a tied head, the embedding's."""
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored:
            tied[id(parameter)] = name
    return {
        name: name if name in stored else tied[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _stream_module(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> None:
    absent: dict[str, nn.Parameter] = {}

    def load(*_: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                absent[name] = parameter
                found = read(f"{prefix}.{name}" if prefix else name)
                module._parameters[name] = nn.Parameter(found.to(parameter.dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(absent)
        absent.clear()

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)
