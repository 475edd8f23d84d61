"""Tasks, the harness and generated answers on a model while it is trained, by the rules of evaluate_model.

The model may be spread over the ranks: all make equally many forwards. Nothing that training draws from is moved.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from megagpt.config import Config, UserError
from megagpt.distributed.world import World
from megagpt.evaluate.generated_answers import AnswerRequest, Exercise, generate_answers, read_exercises
from megagpt.evaluate.harness import LoadedTasks, ask_tasks, documents_sha256, load_tasks, open_adapter
from megagpt.evaluate.likelihood import text_scorer
from megagpt.evaluate.tasks import Question, TaskResult, read_files, read_task, score_task
from megagpt.evaluate.text_scores import TextScores, score_texts
from megagpt.files import sha256_file
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer


class ScoreConfig(Config):
    """What a run is scored by while it is trained, beside its validation loss; fields are those of evaluate_model."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between scores; 0 = only at the end, where something is named below."""
    tasks: dict[str, Path] = Field(default_factory=dict)
    """Multiple-choice and last-word tasks, by name: .jsonl files of the kinds that docs/evaluation.md describes."""
    harness: tuple[str, ...] = ()
    """Tasks, groups and tags of lm-evaluation-harness (megagpt[evaluate]), by name."""
    harness_folder: Path | None = None
    """Folder of the harness's YAML task files; null = the tasks that come with the harness, whose data it downloads."""
    harness_num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question of the harness; null = as each task has it."""
    exercises: dict[str, Path] = Field(default_factory=dict)
    """Prompts with right answers, by name: greedy answers are scored as texts (megagpt[evaluate])."""
    answer_tokens: int = Field(default=64, gt=0)
    """Longest answer to an exercise."""
    answer_stop: tuple[str, ...] = ("\n",)
    """Texts before which an answer to an exercise ends."""
    max_samples: int | None = Field(default=None, gt=0)
    """Questions per task and exercises at most; null = all."""

    @property
    def asks(self) -> bool:
        """Whether there is anything to score by."""
        return bool(self.tasks or self.harness or self.exercises)

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        names = [*self.tasks, *self.harness, *self.exercises]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: a name of tasks, harness and exercises stands for one of them only")
        if self.every_steps and not self.asks:
            raise ValueError(f"every_steps={self.every_steps}: tasks, harness or exercises have to be named")
        return self


@dataclass(frozen=True)
class Questions:
    """What ScoreConfig names, read."""

    config: ScoreConfig
    tasks: dict[str, list[Question]]
    harness: LoadedTasks | None
    exercises: dict[str, list[Exercise]]
    digest: str
    """16 hex digits of files, names and limits: scores are comparable if it is the same."""


def read_questions(config: ScoreConfig, *, seq_len: int) -> Questions:
    """Read all questions. Raises UserError, naming file and line, on what cannot be read or asked of a model of `seq_len`."""
    if config.exercises and config.answer_tokens >= seq_len:
        raise UserError(f"score.answer_tokens={config.answer_tokens} leaves no room for a prompt in seq_len={seq_len}")
    tasks = read_files("score.tasks", config.tasks, read_task, config.max_samples)
    exercises = read_files("score.exercises", config.exercises, read_exercises, config.max_samples)
    if exercises:
        score_texts(["a"], [["a"]])  # says now what is not installed
    harness = load_tasks(config.harness, config.harness_folder) if config.harness else None
    measured = config.model_dump(mode="json", exclude={"every_steps", "tasks", "exercises", "harness_folder"})
    measured |= {"tasks": {name: sha256_file(path) for name, path in config.tasks.items()}}
    measured |= {"exercises": {name: sha256_file(path) for name, path in config.exercises.items()}}
    if harness is not None:  # the same names in another folder are other tasks
        measured["harness_documents"] = documents_sha256(harness, config.max_samples)
    digest = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
    return Questions(config, tasks, harness, exercises, digest)


def check_metric(config: ScoreConfig, metric: str) -> None:
    """Raise UserError if `metric`, "TASK.METRIC", cannot be among the scores; the harness's own metrics are known later."""
    task, _, name = metric.rpartition(".")
    known = set()
    if task in config.tasks:
        known = {field.name for field in fields(TaskResult)}
    elif task in config.exercises:
        known = {field.name for field in fields(TextScores)} - {"bleu_signature", "standard_errors"}
    elif task in config.harness:
        return
    if name not in known:
        what = f"one of {', '.join(sorted(known))}" if known else "TASK.METRIC of a name in score.tasks, harness or exercises"
        raise UserError(f"best_by={metric}: loss, or {what}, is expected")


def score_model(
    model: Callable[..., Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    questions: Questions,
    world: World,
    *,
    micro_batch_size: int,
) -> dict[str, dict[str, Any]]:
    """What was found, by kind (tasks, harness, exercises) and name, as results of evaluate_model have it; on every rank.

    All ranks call it together, with the model in evaluation mode. Raises Stopped on all ranks within one forward's time after
    one was told to stop.
    """
    asked = questions.config
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "world": world}
    parts = (model, config, tokenizer)
    with random_states_kept():
        scorer = text_scorer(*parts, **options)
        tasks = {name: asdict(score_task(scorer, items)) for name, items in questions.tasks.items()}
        harness = {}
        if questions.harness is not None:
            adapter, few = open_adapter(*parts, in_step=True, **options), asked.harness_num_fewshot
            found = ask_tasks(adapter, questions.harness, world, num_fewshot=few, max_questions=asked.max_samples)
            harness = {name: asdict(task) for name, task in found.items()}
        exercises = {}
        for name, items in questions.exercises.items():
            requests = [AnswerRequest(item.prompt, asked.answer_stop, asked.answer_tokens) for item in items]
            texts = generate_answers(*parts, requests, in_step=True, **options)
            exercises[name] = asdict(score_texts(texts, [item.answers for item in items]))
    return {"tasks": tasks, "harness": harness, "exercises": exercises}


def numbers_of(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The scores as task -> metric -> number: what a row of metrics.jsonl has, and best_by names."""
    scores = {}
    for kind, by_name in found.items():
        for name, result in by_name.items():
            values = result["metrics"] if kind == "harness" else result
            scores[name] = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return scores


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The generators of random, numpy and torch are afterwards where they were: lm-eval seeds all of them."""
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
