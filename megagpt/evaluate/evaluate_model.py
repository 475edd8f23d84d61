"""How good a model is: validation loss, perplexity and bits per byte, and likelihoods of given texts for tasks with answers."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megagpt.checkpoint.load_model import LoadedModel, load_model
from megagpt.config import Config, UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import DataConfig
from megagpt.distributed.world import lone_world, pick_device
from megagpt.evaluate.likelihood import text_scorer
from megagpt.evaluate.loss import Score, combine, evaluate_sources, validation_set
from megagpt.evaluate.results import keep_result
from megagpt.evaluate.tasks import TaskResult, read_task, score_task
from megagpt.files import sha256_file
from megagpt.settings_record import read_settings

log = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """Evaluate a checkpoint of a run, on one process."""

    run_dir: Path
    """The run whose checkpoint is evaluated."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    shards: dict[str, Path] = Field(default_factory=dict)
    """Folders of shards to evaluate on, by name (each with a manifest.json); empty = the run's own validation splits."""
    tasks: dict[str, Path] = Field(default_factory=dict)
    """Multiple-choice and last-word tasks, by name: .jsonl files of the kinds that megagpt/evaluate/tasks.py describes."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Samples per forward."""
    max_samples: int | None = Field(default=None, gt=0)
    """Samples per source and questions per task at most; null = all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""


@dataclass(frozen=True)
class Evaluation:
    """What evaluate_run found, and the file it is written to."""

    path: Path
    step: int
    total: Score
    sources: dict[str, Score]
    unigram_entropies: dict[str, float]
    """Nats per token of each source if tokens were drawn independently with their own frequencies: what loss must beat."""
    tasks: dict[str, TaskResult]


def evaluate_run(config: EvaluateConfig) -> Evaluation:
    """Load a checkpoint, evaluate it, and add the result to run_dir/evaluations/step_<step>.json (see evaluate/results.py).

    Raises UserError if run, checkpoint, shards or tasks are missing or do not fit, before the model is loaded where possible.
    """
    questions = {name: read_task(path)[: config.max_samples] for name, path in config.tasks.items()}
    world = lone_world(pick_device(config.device))
    loaded = load_model(config.run_dir, config.step, device=str(world.device))
    data_config = _data_config(config, loaded)
    datasets = _datasets(config, loaded, data_config)
    sources = evaluate_sources(
        loaded.model,
        loaded.model,
        datasets,
        loaded.tokenizer,
        world,
        micro_batch_size=config.micro_batch_size,
        max_samples=config.max_samples,
        document_mask=data_config.document_mask,
    )
    entropies = {name: unigram_entropy(dataset) for name, dataset in datasets.items()}
    scorer = text_scorer(
        loaded.model, loaded.model_config, loaded.tokenizer, micro_batch_size=config.micro_batch_size, world=world
    )
    tasks = {name: score_task(scorer, items) for name, items in questions.items()}
    path = config.run_dir / "evaluations" / f"step_{loaded.step:08d}.json"
    result = Evaluation(path, loaded.step, combine(sources.values()), sources, entropies, tasks)
    measured = {
        "checkpoint": sha256_file(loaded.path / "manifest.json"),
        "validation_set": validation_set(datasets, max_samples=config.max_samples, document_mask=data_config.document_mask),
        "tasks": {name: sha256_file(path) for name, path in config.tasks.items()},
        "max_samples": config.max_samples,
    }
    keep_result(path, {**to_json(result, config), "measured": measured})
    return result


def to_json(result: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    """An evaluation as it is written to disk."""
    sources = {
        name: {**score.summary(), "unigram_entropy": result.unigram_entropies[name]} for name, score in result.sources.items()
    }
    tasks = {name: asdict(task) for name, task in result.tasks.items()}
    settings = config.model_dump(mode="json")
    return {"step": result.step, **result.total.summary(), "sources": sources, "tasks": tasks, "config": settings}


def describe(result: Evaluation) -> str:
    """An evaluation as lines of text."""
    lines = [f"step {result.step}"]
    for name, score in [*result.sources.items(), ("all", result.total)]:
        entropy = result.unigram_entropies.get(name)
        bits = "" if score.bits_per_byte is None else f"  bits_per_byte {score.bits_per_byte:.4f}"
        beaten = "" if entropy is None else f"  (unigram entropy {entropy:.4f})"
        lines.append(
            f"  {name:<20} loss {score.loss:.4f}{beaten}  perplexity {score.perplexity:.4g}{bits}  "
            f"accuracy {score.accuracy:.4f}  tokens {score.tokens:,}"
        )
    for name, task in result.tasks.items():
        error = "" if task.standard_error is None else f" ± {task.standard_error:.3f}"
        lines.append(
            f"  {name:<20} accuracy {task.accuracy:.3f}{error} (per character {task.accuracy_per_character:.3f}, per byte "
            f"{task.accuracy_per_byte:.3f}, chance {task.chance:.3f})  bits_per_byte {task.bits_per_byte:.4f}  of "
            f"{task.questions:,} questions"
        )
    return "\n".join([*lines, f"written to {result.path}"])


def unigram_entropy(dataset: TokenDataset) -> float:
    """Entropy in nats per token of the frequencies of a split's tokens: no model without context has a lower loss on it."""
    counts = np.zeros(dataset.manifest.vocab_size, np.int64)
    step = 1 << 22
    for start in range(0, dataset.num_tokens, step):
        counts += np.bincount(dataset.tokens(start, step), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _data_config(config: EvaluateConfig, loaded: LoadedModel) -> DataConfig:
    """The run's settings of data; an imported model has none, and takes the shards that are named."""
    if "data" not in loaded.run_config and not config.shards:
        raise UserError(f"{config.run_dir}: an imported model has no data of its own; name shards=... to evaluate on")
    named = {name: {"path": str(path)} for name, path in config.shards.items()}
    values = loaded.run_config.get("data") or {"seq_len": loaded.model_config.seq_len, "sources": named}
    return read_settings(DataConfig, values, source=f"{loaded.path}/state.json")


def _datasets(config: EvaluateConfig, loaded: LoadedModel, data_config: DataConfig) -> dict[str, TokenDataset]:
    """The splits to evaluate on, checked against the model's tokenizer."""
    own = {name: source.path / "validation" for name, source in data_config.sources.items()}
    folders = config.shards or {name: path for name, path in own.items() if path.is_dir()}
    if not folders:
        raise UserError(f"{config.run_dir}: its sources have no validation split; name shards=... to evaluate on")
    options = {"seq_len": data_config.seq_len, "document_end_loss": data_config.document_end_loss}
    datasets = {name: TokenDataset(path, **options) for name, path in folders.items()}
    for dataset in datasets.values():
        if dataset.manifest.tokenizer_sha256 != loaded.tokenizer.fingerprint:
            raise UserError(
                f"{dataset.directory}: made with tokenizer {dataset.manifest.tokenizer_sha256[:12]}, "
                f"the model has {loaded.tokenizer.fingerprint[:12]}"
            )
        if dataset.num_windows() == 0:
            raise UserError(f"{dataset.directory}: {dataset.num_tokens} tokens, at least 2 are needed")
    return datasets
