"""Continuous batching: texts share forwards over the slots of one static cache, and join and leave between any two of them.

How it works. A text holds a slot, and the slots in use are always the first ones: when a text leaves, the last one takes its
slot. Each text has tokens that the cache does not hold yet: all of its prompt in the beginning, one while it is generated.
Neighbours with equally many of them share a forward, so that a step is one forward for all texts that are being generated and
one for each prompt. Long prompts may be cut, so that the other texts do not wait for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from megagpt.data.permutation import mix
from megagpt.generate.sampling import SamplingConfig, next_token, penalise
from megagpt.model.cache import Cache


@dataclass(eq=False)
class Text:
    """A text that is being generated."""

    ids: list[int]
    """Of the prompt, and of what was generated."""
    sampling: SamplingConfig
    generator: torch.Generator
    num_prompt: int
    num_logprobs: int | None = None
    """Report the logarithm of each token's probability, and those of this many likeliest tokens; None = no."""
    begin: int = 0
    """Which of the ids is the first in the cache: it moves when the context is full."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, in nats, before temperature and penalties."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that a step gave a text."""

    text: Text
    token: int
    logprob: Logprob | None = None


@dataclass
class Batch:
    """The texts that share a model, at most `num_slots` at a time."""

    model: Callable[..., Tensor]
    cache: Cache
    seq_len: int
    """The model's: a text whose slot has this many tokens continues from its last half, with positions from 0 again."""
    device: torch.device
    vocab_size: int | None = None
    """Ids from there on (padding of the embedding) are never drawn."""
    max_prompt_tokens: int | None = None
    """Prompt tokens of a step at most, but for one text's that fit in it; None = all."""
    texts: list[Text] = field(default_factory=list)
    """By slot."""

    @property
    def num_slots(self) -> int:
        """How many texts there may be."""
        return len(self.cache.lengths)

    def add(self, ids: Sequence[int], sampling: SamplingConfig, *, stream: int = 0, num_logprobs: int | None = None) -> Text:
        """Begin a text with a prompt of at least one token; the next step computes it. `stream`: number of its random stream.

        A prompt longer than seq_len is cut from the left. Raises ValueError if all slots are taken.
        """
        if len(self.texts) == self.num_slots:
            raise ValueError(f"all {self.num_slots} slots are taken")
        generator = torch.Generator().manual_seed(mix(sampling.seed, stream) >> 1)
        text = Text(list(ids), sampling, generator, len(ids), num_logprobs, max(0, len(ids) - self.seq_len))
        self.cache.clear([len(self.texts)])
        self.texts.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Take a text out; the last one gets its slot."""
        slot, last = self.texts.index(text), len(self.texts) - 1
        if slot != last:
            self.cache.move(last, slot)
            self.texts[slot] = self.texts[last]
        self.texts.pop()

    @torch.no_grad()
    def step(self) -> list[Drawn]:
        """Forwards for all texts; the next token of each, but of those whose prompt is not in the cache yet."""
        counts = self._pending()
        drawn: list[Drawn] = []
        for count, group in groupby(range(len(self.texts)), key=counts.__getitem__):
            slots = list(group)
            if count == 0:
                continue
            rows = [self._new_ids(slot)[:count] for slot in slots]
            logits_bv = self.model(torch.tensor(rows, device=self.device), cache=self.cache, first_slot=slots[0])
            ready = [i for i, slot in enumerate(slots) if not self._new_ids(slot)]
            if ready:
                logits_bv = logits_bv[:, -1, : self.vocab_size].float()
                whole = len(ready) == len(slots)
                drawn += draw([self.texts[slots[i]] for i in ready], logits_bv if whole else logits_bv[ready])
        for one in drawn:
            one.text.ids.append(one.token)
        return drawn

    def _pending(self) -> list[int]:
        """How many tokens of each slot this step computes."""
        left, counts = self.max_prompt_tokens, []
        for slot, text in enumerate(self.texts):
            if self.cache.lengths[slot] + len(self._new_ids(slot)) > self.seq_len:
                text.begin = len(text.ids) - max(1, self.seq_len // 2)
                self.cache.clear([slot])
            count = len(self._new_ids(slot))
            if left is not None and count > 1:
                count = min(count, left)
                left -= count
            counts.append(count)
        return counts

    def _new_ids(self, slot: int) -> list[int]:
        """The ids of a slot's text that the cache does not hold."""
        text = self.texts[slot]
        return text.ids[text.begin + self.cache.lengths[slot] :]


def draw(texts: Sequence[Text], logits_bv: Tensor) -> list[Drawn]:
    """The next token of each text from its logits [B, V]; texts with the same settings are drawn together."""
    settings: dict[tuple[float | int | None, ...], list[int]] = {}
    for row, text in enumerate(texts):
        s = text.sampling
        settings.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
    tokens = [0] * len(texts)
    for rows in settings.values():
        chosen_bv = logits_bv if len(rows) == len(texts) else logits_bv[rows]
        if any(_has_penalty(texts[row].sampling) for row in rows):
            chosen_bv = torch.stack([_penalised(texts[row], logits_v) for row, logits_v in zip(rows, chosen_bv, strict=True)])
        draws_b = torch.cat([torch.rand(1, generator=texts[row].generator, dtype=torch.float64) for row in rows])
        found = next_token(chosen_bv, draws_b.to(logits_bv.device), texts[rows[0]].sampling).tolist()
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    logprobs = _logprobs(texts, logits_bv, tokens)
    return [Drawn(*row) for row in zip(texts, tokens, logprobs, strict=True)]


def _has_penalty(sampling: SamplingConfig) -> bool:
    return sampling.repetition_penalty != 1.0 or bool(sampling.frequency_penalty or sampling.presence_penalty)


def _penalised(text: Text, logits_v: Tensor) -> Tensor:
    return penalise(logits_v, text.ids[: text.num_prompt], text.ids[text.num_prompt :], text.sampling)


def _logprobs(texts: Sequence[Text], logits_bv: Tensor, tokens: Sequence[int]) -> list[Logprob | None]:
    found: list[Logprob | None] = [None] * len(texts)
    for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        if text.num_logprobs is None:
            continue
        logprobs_v = logits_bv[row].log_softmax(dim=-1)
        likeliest = logprobs_v.topk(min(text.num_logprobs, len(logprobs_v)))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        found[row] = Logprob(token, float(logprobs_v[token]), tuple(pairs))
    return found
