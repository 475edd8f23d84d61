"""Tasks with right answers: questions from .jsonl files, scored by how likely a model finds each option.

A line is one of these, told apart by its keys:
  {"context", "continuation"}             is the continuation what the model itself would write? (LAMBADA)
  {"query", "choices", "gold"}            which continuation is likeliest? (PIQA, ARC, OpenBookQA, COPA)
                                          a query that begins with "Question: " is ended by "\\nAnswer:", as lm-eval does
  {"context_options", "continuation", "gold"}   after which context is it likeliest? (Winograd schemas)
  {"sentence_good", "sentence_bad"}       is the good sentence likelier? (BLiMP)
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
import zstandard

from megagpt.config import Failure, UserError
from megagpt.documents import open_lines

T = TypeVar("T")
Scorer = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]
"""(context, continuation) pairs to (log-likelihood in nats, whether every token was the likeliest)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Options, each a context and its continuation, and which is right. A single option asks for the likeliest text."""

    options: tuple[tuple[str, str], ...]
    gold: int
    choices: tuple[str, ...]
    """What likelihoods are divided by the length of: the continuations as the file has them, without the space before them."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How many questions were answered rightly: by the rules, and with the names, that lm-eval has (`acc`, `acc_norm` ...)."""

    questions: int
    accuracy: float
    """Share of questions whose right option is the likeliest or, where there is one option, is what the model would write."""
    accuracy_per_character: float
    """With likelihoods divided by the characters of the choice, which does not favour short answers (lm-eval's acc_norm)."""
    accuracy_per_byte: float
    """Divided by its UTF-8 bytes (acc_bytes)."""
    chance: float
    """The accuracy of guessing."""
    standard_error: float | None
    """Of accuracy: deviation of the sample / sqrt(questions); None of a single question."""
    standard_error_per_character: float | None
    standard_error_per_byte: float | None
    loss_of_gold: float
    """Mean nats of the right continuation."""
    bits_per_byte: float
    """Bits of the right continuations per UTF-8 byte of them, all questions together: moves before accuracy does."""


def read_files(
    setting: str, files: Mapping[str, Path], read: Callable[[Path], list[T]], limit: int | None
) -> dict[str, list[T]]:
    """What `read` finds in each file that a setting names, `limit` at most. Raises UserError naming setting, file and line,
    Failure where the disk fails."""
    found = {}
    for name, path in files.items():
        try:
            found[name] = read(path)[:limit]
        except UserError as error:
            raise UserError(f"{setting}.{name}: {error}") from None
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{setting}.{name}: {path}: damaged: {error}") from None
        except OSError as error:
            raise Failure(f"{setting}.{name}: {path}: {error.strerror}") from None
    return found


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
    right: list[tuple[bool, bool, bool]] = []
    nats_of_gold, bytes_of_gold, chance = [], 0, 0.0
    for question in questions:
        found = [next(scores) for _ in question.options]
        nats = [likelihood for likelihood, _ in found]
        nats_of_gold.append(-nats[question.gold])
        bytes_of_gold += len(question.choices[question.gold].encode())
        if len(found) == 1:
            right.append((found[0][1], found[0][1], found[0][1]))
            continue
        characters = [n / max(1, len(text)) for n, text in zip(nats, question.choices, strict=True)]
        utf8 = [n / max(1, len(text.encode())) for n, text in zip(nats, question.choices, strict=True)]
        first, second, third = (values.index(max(values)) == question.gold for values in (nats, characters, utf8))
        right.append((first, second, third))
        chance += 1 / len(found)
    count = len(questions)
    whole, by_character, by_byte = zip(*right, strict=True)
    return TaskResult(
        questions=count,
        accuracy=sum(whole) / count,
        accuracy_per_character=sum(by_character) / count,
        accuracy_per_byte=sum(by_byte) / count,
        chance=chance / count,
        standard_error=standard_error(whole),
        standard_error_per_character=standard_error(by_character),
        standard_error_per_byte=standard_error(by_byte),
        loss_of_gold=math.fsum(nats_of_gold) / count,
        bits_per_byte=math.fsum(nats_of_gold) / math.log(2) / max(1, bytes_of_gold),
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`: the deviation of the sample (n - 1) / sqrt(n); None of a single one."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _question(line: dict[str, Any]) -> Question:
    if "sentence_good" in line:
        choices = [line["sentence_good"], line["sentence_bad"]]
        return Question(tuple(_join("", choice) for choice in choices), 0, tuple(choices))
    if "context_options" in line:
        contexts, choices = line["context_options"], [line["continuation"]] * len(line["context_options"])
    elif "choices" in line:
        contexts, choices = [_prompt(line["query"])] * len(line["choices"]), line["choices"]
    else:
        contexts, choices = [line["context"]], [line["continuation"]]
    options = [_join(context, choice) for context, choice in zip(contexts, choices, strict=True)]
    gold = line.get("gold", 0)
    if not 0 <= gold < len(options):
        raise IndexError(f"gold={gold} of {len(options)} options")
    return Question(tuple(options), gold, tuple(choices))


def _prompt(query: str) -> str:
    """lm-eval's prompt of PIQA and ARC, where a query has the first half of it."""
    return f"{query.rstrip()}\nAnswer:" if query.startswith("Question: ") and "\nAnswer:" not in query else query


def _join(context: str, continuation: str) -> tuple[str, str]:
    """A space goes to the front of the continuation, as lm-eval's target_delimiter, unless the context ends in white space."""
    return (context, continuation) if context[-1:].isspace() else (context, f" {continuation}")
