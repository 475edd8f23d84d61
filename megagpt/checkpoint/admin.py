"""Maintenance of the checkpoints of a run: list, verify, prune, average, merge."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from megagpt.checkpoint.base_weights import read_model
from megagpt.checkpoint.load_model import find_checkpoint
from megagpt.checkpoint.on_disk import FORMAT, list_checkpoints, read_state, step_of, verify
from megagpt.checkpoint.partitions import CheckpointError, read_partitions, write_safetensors
from megagpt.checkpoint.save_load import prune, seal
from megagpt.checkpoint.scores import read_best, validation_loss
from megagpt.checkpoint.tokenizers import tokenizer_of
from megagpt.config import Config, UserError
from megagpt.data.state import TrainState
from megagpt.engine.base import Partition
from megagpt.engine.build import whole_shapes
from megagpt.files import read_object, write_json
from megagpt.model.gpt import ModelConfig
from megagpt.model.tune import TuneConfig
from megagpt.settings_record import read_settings

log = logging.getLogger(__name__)


class InspectConfig(Config):
    """Actions on the checkpoints of a run; without one they are listed."""

    run_dir: Path
    """The run directory."""
    verify: bool = False
    """Read every file and compare it with its sha256."""
    prune: bool = False
    """Delete all but the newest keep_last, the best, and multiples of keep_every_steps; and quarantined ones."""
    keep_last: int = Field(default=2, gt=0)
    """prune: how many of the newest are kept."""
    keep_every_steps: int = Field(default=0, ge=0)
    """prune: checkpoints of multiples of this step are kept; 0 = none."""
    average: tuple[int, ...] = ()
    """Steps whose weights are averaged into one checkpoint (arXiv 1803.05407), written to output_dir as a run of its own."""
    merge: bool = False
    """Write the newest checkpoint of a run that freezes weights or has adapters as a whole model, a run of its own in
    output_dir."""
    output_dir: Path | None = None
    """average, merge: a new run directory, for evaluation, generation and export; it has no optimizer states."""

    @model_validator(mode="after")
    def _check(self) -> "InspectConfig":
        if self.merge and (self.output_dir is None or self.average):
            raise ValueError("merge needs output_dir, and no average")
        if self.average and (self.output_dir is None or len(self.average) < 2):
            raise ValueError("average needs two steps or more, and output_dir")
        return self


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One line of the list."""

    path: Path
    step: int
    bytes: int
    saved_at: str
    validation_loss: float | None
    best: bool
    aside: bool
    """Damaged, or newer than the step that a start went back to: no start uses it."""
    problems: tuple[str, ...]


def inspect(config: InspectConfig) -> list[CheckpointInfo]:
    """Do the actions of the configuration; returns the checkpoints left. Raises UserError on a missing run or step."""
    if not (config.run_dir / "checkpoints").is_dir():
        raise UserError(f"run_dir={config.run_dir}: there is no folder checkpoints/ in it")
    if config.average and config.output_dir is not None:
        average(config.run_dir, config.average, config.output_dir)
    if config.merge and config.output_dir is not None:
        merge(config.run_dir, config.output_dir)
    if config.prune:
        for path in prune(config.run_dir, keep_last=config.keep_last, keep_every_steps=config.keep_every_steps):
            log.info("deleted %s", path)
        for path in _set_aside(config.run_dir):
            shutil.rmtree(path)
            log.info("deleted %s", path)
    best_step = read_best(config.run_dir).get("step")
    paths = [*list_checkpoints(config.run_dir), *_set_aside(config.run_dir)]
    return [_look_at(path, best_step, config.verify) for path in paths]


def average(run_dir: Path, steps: Sequence[int], output_dir: Path) -> Path:
    """Write the mean of the weights of several steps as the only checkpoint of `output_dir`; returns its path.

    Sums are taken in fp64. Raises UserError if a step is missing or output_dir exists, CheckpointError if one is damaged.
    """
    if output_dir.exists():
        raise UserError(f"output_dir={output_dir} exists; name a new one")
    paths = [run_dir / "checkpoints" / f"step_{step:08d}" for step in steps]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"average: {path} does not exist")
        problems = verify(path)
        if problems:
            raise CheckpointError("; ".join(problems))
    saved = read_state(paths[-1], of_model=True)
    if saved.get("base"):
        raise UserError(f"average: {paths[-1]}: holds only what was trained beside {saved['base']['path']}: merge=true first")
    shapes = whole_shapes(read_settings(ModelConfig, saved["model"], source=str(paths[-1] / "state.json")))
    means = {f"param.{name}": _mean(paths, f"param.{name}", shape.numel()) for name, shape in shapes.items()}
    return _write_weights(run_dir, output_dir, max(steps), means, saved, {"averaged": [str(path) for path in paths]})


def merge(run_dir: Path, output_dir: Path) -> Path:
    """Write the whole model of a tuned run's newest good checkpoint, adapters merged, as the only one of `output_dir`.

    Raises UserError if output_dir exists, or the run keeps whole models; CheckpointError if a file is damaged.
    """
    if output_dir.exists():
        raise UserError(f"output_dir={output_dir} exists; name a new one")
    path = find_checkpoint(run_dir)
    saved = read_state(path, of_model=True)
    if not saved.get("base"):
        raise UserError(f"merge: {path}: holds the whole model already")
    model = read_model(path, read_settings(ModelConfig, saved["model"], source=str(path / "state.json")))
    weights = {f"param.{name}": parameter.data.flatten() for name, parameter in model.named_parameters()}
    plain = {**saved["config"], "tune": TuneConfig().model_dump(mode="json")}
    return _write_weights(run_dir, output_dir, step_of(path), weights, {**saved, "config": plain}, {"merged": str(path)})


def _write_weights(
    run_dir: Path, output_dir: Path, step: int, weights: dict[str, torch.Tensor], saved: dict[str, Any], origin: dict[str, Any]
) -> Path:
    """A run directory whose only checkpoint holds these weights and no optimizer states."""
    folder = output_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    size, digest = write_safetensors(folder / "pieces_00000.safetensors", weights, dict.fromkeys(weights, "0"))
    write_json(
        folder / "state.json",
        {
            "format": FORMAT,
            "train_state": TrainState(step=step).to_json(),
            "updates": 0,
            **origin,
            **{key: saved[key] for key in ("model", "config", "data_fingerprint", "tokenizer_sha256") if key in saved},
        },
    )
    seal(folder, {"pieces_00000.safetensors": {"size": size, "sha256": digest}})
    tokenizer_of(run_dir, saved.get("tokenizer_sha256")).save(output_dir / "tokenizer")
    return folder


def _set_aside(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("aside_*_step_*"))


def _mean(paths: Sequence[Path], key: str, numel: int) -> torch.Tensor:
    total = torch.zeros(numel, dtype=torch.float64)
    for path in paths:
        partition = torch.empty(numel)
        read_partitions(path, {key: Partition(partition, 0, numel)})
        total += partition
    return (total / len(paths)).float()


def _look_at(path: Path, best_step: int | None, read_all: bool) -> CheckpointInfo:
    size = sum(file.stat().st_size for file in path.iterdir())
    try:
        saved = read_object(path / "state.json")
        manifest_problems: tuple[str, ...] = () if (path / "manifest.json").is_file() else (f"{path}: no manifest",)
    except UserError as error:
        saved, manifest_problems = {}, (str(error),)
    problems = tuple(verify(path)) if read_all else manifest_problems
    aside, step = path.name.startswith("aside_"), int(path.name.rpartition("_")[2])
    best = step == best_step and not aside
    return CheckpointInfo(path, step, size, saved.get("saved_at", "?"), validation_loss(path), best, aside, problems)
