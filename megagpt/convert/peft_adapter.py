"""LoRA adapters in peft's format, both ways: adapter_config.json and adapter_model.safetensors (peft 0.21).

peft knows the layers of transformers. Where one of theirs holds several of ours (GPT-2's c_attn: query, key, value), our
adapters become one of the sum of their ranks, A stacked and B block-diagonal, with a rank and an alpha of its own. The other
way a peft adapter is merged into the weights that are imported, whatever layers it has. A classifier's layer of classes, which
is trained whole, is a module that peft saves beside the adapters (modules_to_save), under its name in transformers: `score`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.checkpoint.base_weights import read_adapters
from megagpt.checkpoint.on_disk import read_state
from megagpt.checkpoint.partitions import index_of
from megagpt.config import UserError
from megagpt.convert.families import Planned, family_for, plan_tensors
from megagpt.convert.weight_files import Parameters
from megagpt.files import read_json, write_json
from megagpt.model.gpt import ModelConfig
from megagpt.model.tune import CLASS_HEAD, LoraConfig, TuneConfig
from megagpt.settings_record import read_settings

CONFIG_FILE, WEIGHTS_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
UNKNOWN = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
    "layer_replication", "exclude_modules", "lora_bias", "arrow_config", "corda_config", "velora_config",
)  # fmt: skip
"""Settings of peft that change what is computed and that the import does not compute: refused where they are set."""
CLASS_MODULE, CLASS_MODULES = "score", {"score", "classifier"}
"""transformers' name of the layer of classes, and the names that peft saves of any classifier: those that the model has."""


def write_adapter(checkpoint: Path, folder: Path, base_model: str) -> None:
    """Write a checkpoint's adapters into `folder` for `PeftModel.from_pretrained`. Raises UserError if it has none, or has
    trained other weights too, which such a folder does not hold."""
    from safetensors.torch import save_file

    state = read_state(checkpoint, of_model=True)
    source = str(checkpoint / "state.json")
    config = read_settings(ModelConfig, state["model"], source=source)
    tune = read_settings(TuneConfig, state["config"].get("tune") or {}, source=source)
    if tune.lora is None:
        raise UserError(f"adapter_only=true: {checkpoint} has no adapters (tune.lora)")
    if tune.lora.also_train:
        raise UserError(
            f"adapter_only=true: {checkpoint} has trained {', '.join(tune.lora.also_train)} beside its adapters, which peft's "
            "files would lack: export the whole model, adapters merged"
        )
    tensors, ranks = {}, {}
    if config.classes:
        parameters = Parameters(checkpoint, index_of(checkpoint), {CLASS_HEAD: (len(config.classes), config.hidden_size)})
        tensors[f"{PREFIX}{CLASS_MODULE}.weight"] = parameters.read(CLASS_HEAD)
    adapters = read_adapters(checkpoint)
    family = family_for(config)
    for planned in plan_tensors(family, config):
        layers = [name.removesuffix(".weight") for name in planned.ours]
        if any(layer in adapters for layer in layers):
            layer = planned.theirs.removesuffix(".weight")
            a, b = _joined(layers, adapters, planned)
            tensors[f"{PREFIX}{layer}.lora_A.weight"], tensors[f"{PREFIX}{layer}.lora_B.weight"] = a, b
            ranks[layer] = len(a)
    write_json(folder / CONFIG_FILE, _config(ranks, tune.lora, base_model, config, conv1d=family.model_type == "gpt2"))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _joined(layers: list[str], adapters: Mapping[str, tuple[Tensor, Tensor]], planned: Planned) -> tuple[Tensor, Tensor]:
    """One adapter for layers of ours that theirs joins; a layer without one gets rows of zeros in B."""
    if len(layers) == 1:
        a, b = adapters[layers[0]]
        return a.contiguous(), b.contiguous()
    found = [adapters.get(layer) for layer in layers]
    # GPT-2's query, key and value are equally high
    height = (planned.shape[1] if planned.transposed else planned.shape[0]) // len(layers)
    blocks = [torch.zeros(height, 0) if pair is None else pair[1] for pair in found]
    return torch.cat([pair[0] for pair in found if pair is not None]), torch.block_diag(*blocks)


def _config(
    ranks: Mapping[str, int], lora: LoraConfig, base_model: str, config: ModelConfig, *, conv1d: bool
) -> dict[str, Any]:
    others = {layer: rank for layer, rank in ranks.items() if rank != lora.rank}
    leaves = {layer.rpartition(".")[2] for layer in others}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.classes else "CAUSAL_LM",
        "modules_to_save": [CLASS_MODULE] if config.classes else None,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha if lora.alpha % 1 else int(lora.alpha),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted({layer.rpartition(".")[2] for layer in ranks}),
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "rank_pattern": {leaf: next(r for layer, r in others.items() if layer.endswith(leaf)) for leaf in sorted(leaves)},
        "alpha_pattern": {
            leaf: next(r for layer, r in others.items() if layer.endswith(leaf)) * lora.alpha / lora.rank
            for leaf in sorted(leaves)
        },
    }


def base_model_of(folder: Path) -> str:
    """The model that a peft adapter was trained on, as its files name it: a folder or a name of the hub; "" if they do not."""
    config = read_json(folder / CONFIG_FILE)
    return str(config.get("base_model_name_or_path") or "") if isinstance(config, dict) else ""


def read_deltas(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a peft adapter adds to each weight of its base model, by the name of theirs, [out, in] in fp32; and a classifier's
    layer of classes, which takes the place of the base model's.

    Raises UserError naming file and setting for what is not plain LoRA.
    """
    from safetensors.torch import load_file

    path = folder / CONFIG_FILE
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type={kind}: LORA is expected")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={config['bias']!r}: only adapters without biases are merged")
    for name in UNKNOWN:
        if config.get(name):
            raise UserError(f"{path}: {name}={json.dumps(config[name])[:80]}: is not merged; merge it with peft first")
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not set(modules) <= CLASS_MODULES:
        raise UserError(
            f"{path}: modules_to_save={json.dumps(modules)[:80]}: only a classifier's {CLASS_MODULE} is imported; "
            "merge it with peft first"
        )
    tensors = load_file(folder / WEIGHTS_FILE)
    of_classes = tensors.pop(f"{PREFIX}{CLASS_MODULE}.weight", None)
    if (of_classes is not None) != bool(modules):
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {PREFIX}{CLASS_MODULE}.weight is {'missing' if modules else 'in it'}, and "
            f"{path} says modules_to_save={json.dumps(modules)}"
        )
    deltas = {}
    for key in sorted(tensors):
        layer, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise UserError(f"{folder / WEIGHTS_FILE}: {key}: lora_A.weight and lora_B.weight are expected")
        a, b = (tensors.get(f"{PREFIX}{layer}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            raise UserError(f"{folder / WEIGHTS_FILE}: {layer}: one of lora_A and lora_B is missing")
        rank = _by_pattern(config.get("rank_pattern") or {}, layer, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
        if len(a) != rank:
            raise UserError(f"{folder / WEIGHTS_FILE}: {layer}: lora_A has {len(a)} rows, {path} says r={rank}")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        deltas[f"{layer}.weight"] = (b.float() @ a.float()) * scale
    return deltas, {} if of_classes is None else {f"{CLASS_MODULE}.weight": of_classes.float()}


def with_deltas(model: nn.Module, deltas: Mapping[str, Tensor], replaced: Mapping[str, Tensor]) -> nn.Module:
    """A model of transformers with an adapter merged into it, and what it has in the place of the model's own; `deltas` as the
    model stores its weights."""
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
        for name, tensor in replaced.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _by_pattern(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """peft's rule: the first key that the layer's name ends with, as a whole part of it."""
    return next((value for key, value in patterns.items() if f".{layer}".endswith(f".{key}")), otherwise)
