"""Greedy answers to prompts, and the .jsonl files of prompts with right answers that they are scored against.

A line is {"prompt": text, "answer": text} or {"prompt": text, "answers": [text, ...]}, of which the best counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from torch import Tensor

from megagpt.config import UserError
from megagpt.distributed.world import Stopped, World
from megagpt.documents import open_lines
from megagpt.evaluate.answers import Journal, answer_groups
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.generate.text_stream import StreamDecoder
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer, prompt_ids


@dataclass(frozen=True, slots=True)
class Exercise:
    """A prompt and its right answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """A prompt, and where its answer ends: before the first of `stop`, at an end-of-text token, or after max_tokens."""

    prompt: str
    stop: tuple[str, ...]
    max_tokens: int


def read_exercises(path: Path) -> list[Exercise]:
    """The exercises of a .jsonl file (.gz, .zst too). Raises UserError naming file and line."""
    exercises = []
    with open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                value = orjson.loads(line)
                answers = value["answers"] if "answers" in value else [value["answer"]]
                texts = [value["prompt"], *answers]
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number}: prompt, and answer or answers, are expected: {error!r}") from None
            if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path}: line {number}: prompt is a text, answer a text, answers a list of at least one text")
            exercises.append(Exercise(value["prompt"], tuple(answers)))
    if not exercises:
        raise UserError(f"{path}: holds no prompts")
    return exercises


@torch.no_grad()
def generate_answers(
    model: Callable[..., Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    requests: Sequence[AnswerRequest],
    *,
    micro_batch_size: int,
    world: World,
    journal: Journal | None = None,
    in_step: bool = False,
) -> list[str]:
    """The greedy answer to each request, in order, without its stop string. Put the model into evaluation mode first.

    A prompt too long for the model is cut from the left, so that prompt and answer fit. Prompts of equally many tokens go
    through the model together. The ranks share the work, and all get the same result. Each has a whole copy of the model, or
    `in_step` is true: then all make equally many forwards, as weights that are spread over the ranks need, and a stop request
    is answered after each. Raises UserError if max_tokens leaves no room for a prompt, Stopped on all ranks.
    """
    rows: list[tuple[list[int], tuple[str, ...], int, bool]] = []
    for request in requests:
        room = config.seq_len - request.max_tokens
        if room < 1:
            raise UserError(f"{request.max_tokens} tokens of an answer and a prompt are more than seq_len={config.seq_len}")
        rows.append((prompt_ids(tokenizer, request.prompt)[-room:], request.stop, request.max_tokens, not request.prompt))

    by_shape: dict[tuple[int, tuple[str, ...], int, bool], list[int]] = {}
    for i, (ids, stop, max_tokens, at_start) in enumerate(rows):
        by_shape.setdefault((-len(ids), stop, max_tokens, at_start), []).append(i)
    batches = []
    for shape in sorted(by_shape):
        alike = by_shape[shape]
        batches += [alike[start : start + micro_batch_size] for start in range(0, len(alike), micro_batch_size)]

    def answer(group: Sequence[tuple[list[int], tuple[str, ...], int, bool]]) -> list[str]:
        _, stop, max_tokens, at_start = group[0]
        ids_bt = torch.tensor([ids for ids, *_ in group], device=world.device)
        sampling = SamplingConfig(max_tokens=longest if in_step else max_tokens, temperature=0.0)
        eos_ids = () if in_step else tokenizer.eos_ids
        steps = generate_ids(model, config, ids_bt, sampling, vocab_size=tokenizer.vocab_size, eos_ids=eos_ids)
        decoders = [StreamDecoder(tokenizer, at_start=at_start) for _ in group]
        texts, done = [""] * len(group), [False] * len(group)
        for count, tokens in enumerate(steps, start=1):
            for i, token in enumerate(tokens):
                if done[i] or token is None or token in tokenizer.eos_ids:
                    done[i] = True
                    continue
                texts[i] += decoders[i].push(token)
                done[i] = count == max_tokens or any(text in texts[i] for text in stop)
            if all_done(done):
                break
        whole = [text + decoder.finish() for text, decoder in zip(texts, decoders, strict=True)]
        return [cut_at(text, stop) for text in whole]

    longest = max((request.max_tokens for request in requests), default=0)

    def all_done(done: Sequence[bool]) -> bool:
        if not in_step:
            return all(done)
        unfinished, stopped = world.sum([not all(done), bool(world.stop.signal_name)])
        world.progress()
        if stopped:
            raise Stopped
        return unfinished == 0

    texts = [""] * len(requests)
    groups = [[rows[i] for i in batch] for batch in batches]
    for batch, answers in zip(batches, answer_groups(groups, answer, world, journal), strict=True):
        for i, text in zip(batch, answers, strict=True):
            texts[i] = text
    return texts


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings that is in it."""
    places = [text.find(mark) for mark in stop if mark]
    return text[: min([place for place in places if place >= 0], default=len(text))]
