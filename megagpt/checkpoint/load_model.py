"""The model of a run in one process: to evaluate, to generate, to export."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagpt.checkpoint.base_weights import read_model
from megagpt.checkpoint.on_disk import list_checkpoints, read_state, step_of, verify
from megagpt.checkpoint.partitions import CheckpointError
from megagpt.checkpoint.scores import read_best
from megagpt.checkpoint.tokenizers import tokenizer_of
from megagpt.config import UserError
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.settings_record import read_settings
from megagpt.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in one process, with its tokenizer and settings."""

    model: GPT
    model_config: ModelConfig
    tokenizer: Tokenizer
    step: int
    run_config: dict[str, Any]
    path: Path


def load_model(
    run_dir: Path, step: int | Literal["last", "best"] = "last", device: str = "cpu", *, classifier: bool = False
) -> LoadedModel:
    """The weights of a run's newest good, best, or named checkpoint as a plain fp32 GPT in evaluation mode.

    Raises UserError if the run or the step does not exist or, unless `classifier` is true, the model is one, which gives no
    text; CheckpointError if no such checkpoint is good.
    """
    path = find_checkpoint(run_dir, step)
    saved = read_state(path, of_model=True)
    config = read_settings(ModelConfig, saved["model"], source=str(path / "state.json"))
    if not classifier:
        refuse_classifier(config, path)
    model = read_model(path, config)
    tokenizer = tokenizer_of(run_dir, saved.get("tokenizer_sha256"))
    return LoadedModel(model.to(device).eval(), config, tokenizer, step_of(path), saved["config"], path)


def refuse_classifier(config: ModelConfig, path: Path, what: str = "a language model is needed") -> None:
    """Raise UserError, with what it is wanted for, if the checkpoint at `path` is of a classifier."""
    if config.classes:
        raise UserError(f"{path}: is a classifier of {list(config.classes)} (model.classes), which gives no text: {what}")


def find_checkpoint(run_dir: Path, step: int | Literal["last", "best"] = "last") -> Path:
    """The newest good checkpoint of a run, its best, or that of a step; warns of newer ones that are not good.

    Raises UserError if the run or the step does not exist, CheckpointError if no such checkpoint is good.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    candidates = list_checkpoints(run_dir)
    if step == "best":
        step = read_best(run_dir).get("step", -1)
    if step != "last":
        candidates = [path for path in candidates if step_of(path) == step]
    if not candidates:
        raise UserError(f"{run_dir / 'checkpoints'}: there is no checkpoint{'' if step == 'last' else f' of step {step}'}")
    for path in reversed(candidates):
        problems = verify(path)
        if not problems:
            return path
        log.warning("passed over %s", "; ".join(problems))
    raise CheckpointError(f"{run_dir / 'checkpoints'}: no checkpoint is good")
