"""How good a model is: loss on validation data, our own tasks, tasks of lm-eval, and generated answers."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megagpt.checkpoint.load_model import LoadedModel, load_model
from megagpt.config import Config, UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import DataConfig, refuse_other_classes, refuse_rows_that_see_each_other
from megagpt.distributed.world import World, lone_world, pick_device
from megagpt.documents import IGNORE
from megagpt.evaluate.answers import Journal
from megagpt.evaluate.classes import describe_classes
from megagpt.evaluate.generated_answers import AnswerRequest, Exercise, generate_answers, read_exercises
from megagpt.evaluate.harness import HarnessTask, LoadedTasks, ask_tasks, load_tasks, open_adapter
from megagpt.evaluate.likelihood import text_scorer
from megagpt.evaluate.loss import Score, combine, evaluate_sources, validation_set
from megagpt.evaluate.results import keep_result
from megagpt.evaluate.tasks import Question, TaskResult, read_files, read_task, score_task
from megagpt.evaluate.text_scores import TextScores, score_texts
from megagpt.files import sha256_file
from megagpt.settings_record import read_settings
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.extended import extends
from megagpt.tokenizer.open_tokenizer import open_tokenizer

log = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """Evaluate a checkpoint of a run: on one process, or on several (torchrun, srun), each with a copy of the model."""

    run_dir: Path
    """The run whose checkpoint is evaluated."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    shards: dict[str, Path] = Field(default_factory=dict)
    """Folders of shards to evaluate on, by name (each with a manifest.json); empty = the run's own validation splits."""
    tasks: dict[str, Path] = Field(default_factory=dict)
    """Multiple-choice and last-word tasks, by name: .jsonl files of the kinds that megagpt/evaluate/tasks.py describes."""
    harness: tuple[str, ...] = ()
    """Tasks, groups and tags of lm-evaluation-harness (megagpt[evaluate]), by name."""
    harness_folder: Path | None = None
    """Folder of the harness's YAML task files, searched first; nothing is downloaded. Data files in them are relative to it.
    null = the tasks that come with the harness, whose data it downloads."""
    harness_num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question of the harness; null = as each task has it."""
    exercises: dict[str, Path] = Field(default_factory=dict)
    """Prompts with right answers, by name: .jsonl files as megagpt/evaluate/generated_answers.py describes. Greedy answers are
    scored by exact match, token F1, ROUGE and BLEU (megagpt[evaluate])."""
    answer_tokens: int = Field(default=64, gt=0)
    """Longest answer to an exercise."""
    answer_stop: tuple[str, ...] = ("\n",)
    """Texts before which an answer to an exercise ends."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Samples per forward."""
    max_samples: int | None = Field(default=None, gt=0)
    """Samples per source, questions per task and exercises at most; null = all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""


@dataclass(frozen=True)
class Evaluation:
    """What evaluate_run found, and the file it is written to."""

    path: Path
    step: int
    total: Score | None
    """None where there is no validation data, and something else to evaluate."""
    sources: dict[str, Score]
    unigram_entropies: dict[str, float]
    """Nats per token of each source if tokens were drawn independently with their own frequencies: what loss must beat."""
    tasks: dict[str, TaskResult]
    harness: dict[str, HarnessTask]
    exercises: dict[str, TextScores]


def evaluate_run(config: EvaluateConfig, world: World | None = None) -> Evaluation:
    """Load a checkpoint, evaluate it, and add the result to run_dir/evaluations/step_<step>.json (see evaluate/results.py).

    All ranks of `world` call it together; each loads the model. What was computed before a stop is used by the next call that
    evaluates the same checkpoint. Raises UserError on all ranks if run, checkpoint, shards or tasks are missing, do not fit or
    are not the same on every rank, before the model is loaded where possible; Stopped after a rank got a stop request.
    """
    world = world or lone_world(pick_device(config.device))
    opened = world.together(lambda: _open(config, str(world.device)))
    loaded = opened.loaded
    world.refuse_difference(f"run_dir={config.run_dir}", {"step": loaded.step, **opened.measured})
    sources = evaluate_sources(
        loaded.model,
        loaded.model,
        opened.datasets,
        loaded.tokenizer,
        world,
        micro_batch_size=config.micro_batch_size,
        max_samples=config.max_samples,
        document_mask=opened.document_mask,
    )
    path = config.run_dir / "evaluations" / f"step_{loaded.step:08d}.json"
    name = f"unfinished_{path.stem}_{opened.measured['checkpoint'][:8]}_{world.device.type}"
    journal = Journal((path.parent / name).resolve())
    parts = (loaded.model, loaded.model_config, loaded.tokenizer)
    options = {"micro_batch_size": config.micro_batch_size, "world": world, "journal": journal}
    tasks = {name: score_task(text_scorer(*parts, **options), items) for name, items in opened.tasks.items()}
    harness = {}
    if opened.harness is not None:
        few, most = config.harness_num_fewshot, config.max_samples
        harness = ask_tasks(open_adapter(*parts, **options), opened.harness, world, num_fewshot=few, max_questions=most)
    answered = {}
    for name, items in opened.exercises.items():
        asked = [AnswerRequest(item.prompt, config.answer_stop, config.answer_tokens) for item in items]
        texts = generate_answers(*parts, asked, **options)
        answered[name] = score_texts(texts, [item.answers for item in items])
    total = combine(sources.values()) if sources else None
    result = Evaluation(path, loaded.step, total, sources, opened.unigram_entropies, tasks, harness, answered)

    measured = dict(opened.measured)
    if harness:
        by_task = {name: task.documents_sha256 for name, task in harness.items()}
        measured["harness"] = {"tasks": by_task, "num_fewshot": config.harness_num_fewshot}

    def keep() -> None:
        keep_result(path, {**to_json(result, config), "measured": measured})
        journal.remove()

    world.together(keep if world.rank == 0 else lambda: None)
    return result


@dataclass(frozen=True)
class _Opened:
    """What an evaluation reads before it computes."""

    tasks: dict[str, list[Question]]
    exercises: dict[str, list[Exercise]]
    harness: LoadedTasks | None
    loaded: LoadedModel
    datasets: dict[str, TokenDataset]
    document_mask: bool
    unigram_entropies: dict[str, float]
    measured: dict[str, Any]
    """Digests and limits that name the result; the harness's are known when it has asked."""


def _open(config: EvaluateConfig, device: str) -> _Opened:
    """Read everything, each rank by itself."""
    tasks = read_files("tasks", config.tasks, read_task, config.max_samples)
    exercises = read_files("exercises", config.exercises, read_exercises, config.max_samples)
    digests = {path: sha256_file(path) for path in (*config.tasks.values(), *config.exercises.values())}
    harness = load_tasks(config.harness, config.harness_folder) if config.harness else None
    loaded = load_model(config.run_dir, config.step, device=device, classifier=not _has_more(config))
    data_config = _data_config(config, loaded)
    datasets = _datasets(config, loaded, data_config) if data_config is not None else {}
    document_mask = data_config is not None and data_config.document_mask
    measured: dict[str, Any] = {
        "checkpoint": sha256_file(loaded.path / "manifest.json"),
        "validation_set": validation_set(datasets, max_samples=config.max_samples, document_mask=document_mask),
        "tasks": {name: digests[path] for name, path in config.tasks.items()},
        "max_samples": config.max_samples,
    }
    if exercises:  # without them results keep the key that they had before there were any
        measured["exercises"] = {name: digests[path] for name, path in config.exercises.items()}
        measured["answers"] = {"tokens": config.answer_tokens, "stop": list(config.answer_stop)}
    entropies = {name: unigram_entropy(dataset) for name, dataset in datasets.items()}
    return _Opened(tasks, exercises, harness, loaded, datasets, document_mask, entropies, measured)


def to_json(result: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    """An evaluation as it is written to disk."""
    sources = {
        name: {
            **score.summary(),
            "unigram_entropy": result.unigram_entropies[name],
            **({"scores": score.class_scores()} if score.classes else {}),
        }
        for name, score in result.sources.items()
    }
    tasks = {name: asdict(task) for name, task in result.tasks.items()}
    total = {} if result.total is None else result.total.summary()
    more = {
        "harness": {name: asdict(task) for name, task in result.harness.items()},
        "exercises": {name: asdict(scores) for name, scores in result.exercises.items()},
    }
    return {"step": result.step, **total, "sources": sources, "tasks": tasks, **more, "config": config.model_dump(mode="json")}


def describe(result: Evaluation) -> str:
    """An evaluation as lines of text."""
    lines = [f"step {result.step}"]
    for name, score in [*result.sources.items(), *([("all", result.total)] if result.total is not None else [])]:
        entropy = result.unigram_entropies.get(name)
        bits = "" if score.bits_per_byte is None else f"  bits_per_byte {score.bits_per_byte:.4f}"
        beaten = "" if entropy is None else f"  (unigram entropy {entropy:.4f})"
        lines.append(
            f"  {name:<20} loss {score.loss:.4f}{beaten}  perplexity {score.perplexity:.4g}{bits}  "
            f"accuracy {score.accuracy:.4f}  {'rows' if score.classes else 'tokens'} {score.tokens:,}"
        )
        lines += describe_classes(score.class_scores())
    for name, task in result.tasks.items():
        by_length = f"per character {task.accuracy_per_character:.3f}, per byte {task.accuracy_per_byte:.3f}"
        lines.append(
            f"  {name:<20} accuracy {task.accuracy:.3f}{_error(task.standard_error)} ({by_length}, chance {task.chance:.3f})  "
            f"bits_per_byte {task.bits_per_byte:.4f}  of {task.questions:,} questions"
        )
    for name, task in result.harness.items():
        found = [
            f"{metric} {_number(value)}{_error(task.standard_errors.get(metric))}" for metric, value in task.metrics.items()
        ]
        questions = "" if task.questions is None else f"  of {task.questions:,} questions"
        lines.append(f"  {name:<20} {'  '.join(found)}{questions}")
    for name, scores in result.exercises.items():
        means = [f"{key} {getattr(scores, key):.3f}{_error(error)}" for key, error in scores.standard_errors.items()]
        lines.append(f"  {name:<20} {'  '.join(means)}  bleu {scores.bleu:.2f}  of {scores.answers:,} answers")
    return "\n".join([*lines, f"written to {result.path}"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2g}"


def unigram_entropy(dataset: TokenDataset) -> float:
    """Entropy in nats per token of the frequencies of a split's tokens: no model without context has a lower loss on it.

    Of rows of fine-tuning data the targets alone count.
    """
    counts = np.zeros(dataset.manifest.vocab_size, np.int64)
    step = 1 << 22
    if dataset.manifest.supervised is not None:
        for targets in (dataset.window(index).targets for index in range(dataset.num_windows())):
            counts += np.bincount(targets[targets != IGNORE], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())
    for start in range(0, dataset.num_tokens, step):
        counts += np.bincount(dataset.tokens(start, step), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _data_config(config: EvaluateConfig, loaded: LoadedModel) -> DataConfig | None:
    """The run's settings of data; an imported model has none, and takes the shards that are named, or None if it needs none."""
    if "data" not in loaded.run_config and not config.shards:
        if _has_more(config):
            return None
        raise UserError(f"{config.run_dir}: an imported model has no data of its own; name shards=... to evaluate on")
    named = {name: {"path": str(path)} for name, path in config.shards.items()}
    values = loaded.run_config.get("data") or {"seq_len": loaded.model_config.seq_len, "sources": named}
    return read_settings(DataConfig, values, source=f"{loaded.path}/state.json")


def _has_more(config: EvaluateConfig) -> bool:
    """Whether there is something to evaluate besides validation data."""
    return bool(config.tasks or config.harness or config.exercises)


def _datasets(config: EvaluateConfig, loaded: LoadedModel, data_config: DataConfig) -> dict[str, TokenDataset]:
    """The splits to evaluate on, checked against the model's tokenizer."""
    own = {name: source.path / "validation" for name, source in data_config.sources.items()}
    folders = config.shards or {name: path for name, path in own.items() if path.is_dir()}
    if not folders and not _has_more(config):
        raise UserError(f"{config.run_dir}: its sources have no validation split; name shards=... to evaluate on")
    options = {"seq_len": data_config.seq_len, "document_end_loss": data_config.document_end_loss}
    datasets = {name: TokenDataset(path, **options) for name, path in folders.items()}
    for dataset in datasets.values():
        refuse_other_classes(dataset, loaded.model_config.classes)
        refuse_rows_that_see_each_other(dataset, document_mask=data_config.document_mask)
        if not _means_the_same(dataset, loaded.tokenizer):
            raise UserError(
                f"{dataset.directory}: made with tokenizer {dataset.manifest.tokenizer_sha256[:12]}, "
                f"the model has {loaded.tokenizer.fingerprint[:12]}"
            )
        if dataset.num_windows() == 0:
            raise UserError(f"{dataset.directory}: {dataset.num_tokens} tokens, at least 2 are needed")
    return datasets


def _means_the_same(dataset: TokenDataset, tokenizer: Tokenizer) -> bool:
    """Whether the ids of a split mean the same to the model: by its tokenizer, or one that it extends."""
    if dataset.manifest.tokenizer_sha256 == tokenizer.fingerprint:
        return True
    try:
        other = open_tokenizer(dataset.directory.parent / "tokenizer")
    except UserError:
        return False
    return other.fingerprint == dataset.manifest.tokenizer_sha256 and extends(tokenizer, other)
