"""Tasks with right answers: questions from .jsonl files, scored by how likely a model finds each option.

A line is one of these, told apart by its keys:
  {"context", "continuation"}             is the continuation what the model itself would write? (LAMBADA)
  {"query", "choices", "gold"}            which continuation is likeliest? (PIQA, ARC, OpenBookQA, COPA)
  {"context_options", "continuation", "gold"}   after which context is it likeliest? (Winograd schemas)
  {"sentence_good", "sentence_bad"}       is the good sentence likelier? (BLiMP)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megagpt.config import UserError
from megagpt.documents import open_lines

Scorer = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]
"""(context, continuation) pairs to (log-likelihood in nats, whether every token was the likeliest)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Options, each a context and its continuation, and which is right. A single option asks for the likeliest text."""

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """`accuracy`: the right option has the highest likelihood, or (single options) is what the model would write.

    `accuracy_per_byte` compares likelihoods per byte of continuation, which does not favour short answers; `chance` is what
    guessing gives; `standard_error` is that of accuracy; `loss_of_gold` the mean nats of the right continuation.
    """

    questions: int
    accuracy: float
    accuracy_per_byte: float
    chance: float
    standard_error: float
    loss_of_gold: float


def read_task(path: Path) -> list[Question]:
    """The questions of a .jsonl file (.gz, .zst too). Raises UserError naming file and line."""
    questions = []
    with open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                questions.append(_question(orjson.loads(line)))
            except (orjson.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                raise UserError(
                    f"{path}: line {number}: no question of a known kind (see megagpt/evaluate/tasks.py): {error!r}"
                ) from None
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def score_task(score: Scorer, questions: Sequence[Question]) -> TaskResult:
    """Score all options at once and count the right answers; the first of equal options is the answer."""
    scores = iter(score([option for question in questions for option in question.options]))
    right = right_per_byte = 0
    loss_of_gold = chance = 0.0
    for question in questions:
        found = [next(scores) for _ in question.options]
        nats = [likelihood for likelihood, _ in found]
        loss_of_gold -= nats[question.gold]
        if len(found) == 1:
            right += found[0][1]
            right_per_byte += found[0][1]
            continue
        per_byte = [n / max(1, len(text.encode())) for n, (_, text) in zip(nats, question.options, strict=True)]
        right += nats.index(max(nats)) == question.gold
        right_per_byte += per_byte.index(max(per_byte)) == question.gold
        chance += 1 / len(found)
    count = len(questions)
    accuracy = right / count
    return TaskResult(
        questions=count,
        accuracy=accuracy,
        accuracy_per_byte=right_per_byte / count,
        chance=chance / count,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / count),
        loss_of_gold=loss_of_gold / count,
    )


def _question(line: dict[str, Any]) -> Question:
    if "sentence_good" in line:
        return Question((("", line["sentence_good"]), ("", line["sentence_bad"])), 0)
    if "context_options" in line:
        options = [_join(context, line["continuation"]) for context in line["context_options"]]
    elif "choices" in line:
        options = [_join(line["query"], choice) for choice in line["choices"]]
    else:
        options = [_join(line["context"], line["continuation"])]
    gold = line.get("gold", 0)
    if not 0 <= gold < len(options):
        raise IndexError(f"gold={gold} of {len(options)} options")
    return Question(tuple(options), gold)


def _join(context: str, continuation: str) -> tuple[str, str]:
    """A space goes to the front of the continuation unless the context ends in white space."""
    return (context, continuation) if not context or context[-1].isspace() else (context, f" {continuation}")
