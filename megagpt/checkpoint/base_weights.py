"""Checkpoints of tuned runs: they hold the trained weights, and name the checkpoint of all other weights.

state.json has `base`: the path of that checkpoint, the sha256 of its manifest, and which rows of the vocabulary were new.
Frozen weights are read from it at every start, so they are always the same bits; using the model takes both checkpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.new_rows import NewRows, read_with_new_rows
from megagpt.checkpoint.on_disk import read_state, verify
from megagpt.checkpoint.partitions import CheckpointError, index_of, problems_of, read_partitions
from megagpt.config import UserError
from megagpt.distributed.world import World
from megagpt.engine.base import Engine, Partition
from megagpt.files import sha256_file
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.model.tune import CLASS_HEAD, LORA_A, LORA_B, TuneConfig, is_adapter, merged
from megagpt.settings_record import read_settings


def base_record(path: Path, rows: NewRows | None) -> dict[str, Any]:
    """The record in state.json of the checkpoint with the frozen weights."""
    new = None if rows is None else {"first": rows.first, "width": rows.width}
    return {"path": str(path.absolute()), "manifest_sha256": sha256_file(path / "manifest.json"), "new_rows": new}


def base_path(record: Mapping[str, Any], where: Path, init_from: Path | None = None) -> Path:
    """The checkpoint that a record names, also if its run has moved to `init_from`. Raises UserError if it is gone or
    changed."""
    named = Path(record["path"])
    places = [named] if init_from is None else [init_from / "checkpoints" / named.name, named]
    found = next((path for path in places if (path / "manifest.json").is_file()), None)
    if found is None:
        raise UserError(f"{where}: its frozen weights are in {named}, which is gone; init_from=RUN says where that run is now")
    if sha256_file(found / "manifest.json") != record["manifest_sha256"]:
        raise UserError(f"{found}: is not the checkpoint that {where} began with: its manifest is another one")
    return found


def load_base(path: Path, rows: NewRows | None, engine: Engine, world: World, *, frozen_only: bool) -> None:
    """Fill the engine from the checkpoint it begins with: the frozen weights, and unless `frozen_only` those trained in full.

    Raises CheckpointError if the checkpoint is damaged. All ranks call it together.
    """
    problems = problems_of(path, world)
    if problems:
        raise CheckpointError("; ".join(problems))
    partitions = engine.frozen()
    if not frozen_only:
        partitions |= {k: p for k, p in engine.state().items() if k.startswith("param.") and not is_adapter(k)}
    index = world.broadcast(index_of(path) if world.rank == 0 else None)
    if f"param.{CLASS_HEAD}" not in index:
        partitions.pop(f"param.{CLASS_HEAD}", None)  # it begins as drawn
    if rows is None:
        read_partitions(path, partitions, world, index)
    else:
        read_with_new_rows(path, partitions, rows, world, index)


def read_model(path: Path, config: ModelConfig) -> GPT:
    """The whole model of a checkpoint in fp32, frozen weights and merged adapters included. Raises UserError if its base is
    gone, CheckpointError if that is damaged."""
    saved = read_state(path, of_model=True)
    if saved.get("base") is None:
        _refuse_other_sizes(path, config)
    model = GPT(config)
    views = {f"param.{name}": parameter.data.flatten() for name, parameter in model.named_parameters()}
    partitions = {key: Partition(view, 0, view.numel()) for key, view in views.items()}
    record = saved.get("base")
    if record is None:
        read_partitions(path, partitions)
        return model
    base = base_path(record, path)
    problems = verify(base)
    if problems:
        raise CheckpointError("; ".join(problems))
    base_index, index, rows = index_of(base), index_of(path), record["new_rows"]
    of_base = {key: partition for key, partition in partitions.items() if key != f"param.{CLASS_HEAD}" or key not in index}
    if rows is None:
        read_partitions(base, of_base, index=base_index)
    else:
        read_with_new_rows(base, of_base, NewRows(**rows), None, base_index)
    read_partitions(path, {key: partition for key, partition in partitions.items() if key in index}, index=index)
    tune = read_settings(TuneConfig, saved["config"]["tune"], source=str(path / "state.json"))
    if tune.lora is not None:
        for layer, (lora_a, lora_b) in read_adapters(path).items():
            weight = model.get_parameter(f"{layer}.weight")
            weight.data.copy_(merged(weight.data, lora_a, lora_b, tune.lora))
    return model


def _refuse_other_sizes(path: Path, config: ModelConfig) -> None:
    """Raise CheckpointError if the model that state.json describes is not the one whose weights are there, before any of it is
    allocated."""
    held: dict[str, int] = {}
    for key, runs in index_of(path).items():
        held[key] = sum(run.length for run in runs)
    layers = {key.split(".")[2] for key in held if key.startswith("param.blocks.")}
    if len(layers) != config.num_layers:
        raise CheckpointError(f"{path}: state.json has num_layers={config.num_layers}, the weights have {len(layers)} layers")
    try:
        with torch.device("meta"):
            wanted = {f"param.{name}": parameter.numel() for name, parameter in GPT(config).named_parameters()}
    except RuntimeError as error:  # sizes whose product is no 64-bit number
        text = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: there is no model of the sizes in state.json, {config!r}: {text}") from None
    for key, elements in wanted.items():
        if held.get(key) != elements:
            raise CheckpointError(
                f"{path}: the model of state.json needs {elements:,} elements of {key}, the checkpoint has {held.get(key, 0):,}"
            )


def read_adapters(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> its factors (A [rank, in], B [out, rank]) of a checkpoint with adapters."""
    saved, index = read_state(path, of_model=True), index_of(path)
    source = str(path / "state.json")
    lora = read_settings(TuneConfig, saved["config"]["tune"], source=source).lora
    layers = sorted(key.removeprefix("param.").removesuffix(f".{LORA_A}") for key in index if _is_a(key)) if lora else []
    found = {}
    for layer in layers:
        factors = []
        for name in (LORA_A, LORA_B):
            runs = index[f"param.{layer}.{name}"]
            flat = torch.empty(max(run.start + run.length for run in runs))
            read_partitions(path, {f"param.{layer}.{name}": Partition(flat, 0, len(flat))}, index=index)
            factors.append(flat)
        rank = lora.rank if lora else 1
        found[layer] = (factors[0].view(rank, -1), factors[1].view(-1, rank))
    return found


def _is_a(key: str) -> bool:
    return key.startswith("param.") and key.endswith(f".{LORA_A}")
