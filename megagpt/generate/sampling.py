"""How the next token is drawn: settings, and small pure functions of logits."""

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from megagpt.config import Config

GREEDY = 0.0
"""The temperature at which the likeliest token is always taken."""


class SamplingConfig(Config):
    """How the next token is drawn."""

    max_tokens: int = Field(default=200, gt=0)
    """Tokens to generate at most."""
    temperature: float = Field(default=0.8, ge=0)
    """Divides the logits: below 1 safer, above 1 wilder, 0 = always the likeliest token."""
    top_k: int | None = Field(default=None, gt=0)
    """Draw among the k likeliest tokens only; null = all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that together have this probability (nucleus, arXiv 1904.09751)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among tokens with at least this share of the likeliest one's probability (arXiv 2407.01082); 0 = off."""
    repetition_penalty: float = Field(default=1.0, ge=1)
    """Divides positive logits of tokens already there and multiplies negative ones (arXiv 1909.05858); 1 = off."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from a token's logit for each time that it was generated, as OpenAI defines it; 0 = off."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from a token's logit once it was generated, as OpenAI defines it; 0 = off."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings: stop='["\\n\\n"]'."""
    seed: int = 0
    """The same seed gives the same text. Row i of a batch draws from a stream of its own."""
    stop_at_eot: bool = True
    """End a text at an end-of-text token, of which a tokenizer may have several."""

    @field_validator("stop")
    @classmethod
    def _check(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would end every text at its start")
        return stop


def next_token(logits_bv: Tensor, draws_b: Tensor, sampling: SamplingConfig) -> Tensor:
    """The next id of each row, [B], from its logits [B, V] (penalised already) and a number drawn from [0, 1)."""
    if sampling.temperature == GREEDY:
        return logits_bv.argmax(dim=-1)
    device = drawing_device(logits_bv.device)
    logits_bv = keep_top_k(logits_bv.to(device) / sampling.temperature, sampling.top_k)
    probabilities_bv = logits_bv.softmax(dim=-1)
    kept_bv = keep_min_p(keep_top_p(probabilities_bv, sampling.top_p), sampling.min_p)
    return pick(kept_bv, draws_b.to(device)).to(logits_bv.device)


def penalise(logits_v: Tensor, prompt: Sequence[int], generated: Sequence[int], sampling: SamplingConfig) -> Tensor:
    """The logits [V] of one text under its three penalties: that of repetition knows the prompt too, OpenAI's do not."""
    if sampling.repetition_penalty != 1.0:
        ids_bt = torch.tensor([[*prompt, *generated]], device=logits_v.device)
        logits_v = penalise_repetition(logits_v[None], ids_bt, sampling.repetition_penalty)[0]
    if generated and (sampling.frequency_penalty or sampling.presence_penalty):
        counts_v = torch.bincount(torch.tensor(generated), minlength=len(logits_v)).to(logits_v.device)
        logits_v = logits_v - counts_v * sampling.frequency_penalty - (counts_v > 0) * sampling.presence_penalty
    return logits_v


def drawing_device(device: torch.device) -> torch.device:
    """Where to draw tokens: on the CPU where only deterministic kernels are allowed; CUDA has none for float cumsum."""
    return torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else device


def penalise_repetition(logits_bv: Tensor, ids_bt: Tensor, penalty: float) -> Tensor:
    """Make tokens that occur in `ids_bt` less likely by `penalty` (1 = unchanged)."""
    if penalty == 1.0:
        return logits_bv
    seen = torch.zeros_like(logits_bv, dtype=torch.bool).scatter_(1, ids_bt, True)
    return torch.where(seen, torch.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty), logits_bv)


def keep_top_k(logits_bv: Tensor, k: int | None) -> Tensor:
    """-inf for all but the k largest logits of each row (and those that equal the k-th)."""
    if k is None or k >= logits_bv.shape[-1]:
        return logits_bv
    smallest_kept = logits_bv.topk(k, dim=-1).values[:, -1:]
    return logits_bv.masked_fill(logits_bv < smallest_kept, -torch.inf)


def keep_top_p(probabilities_bv: Tensor, p: float) -> Tensor:
    """0 for all but the likeliest tokens of each row that are needed to reach probability p; not normalised again."""
    if p >= 1.0:
        return probabilities_bv
    descending, order = probabilities_bv.sort(dim=-1, descending=True)
    unneeded = descending.cumsum(dim=-1) - descending >= p
    return probabilities_bv.scatter(1, order, descending.masked_fill(unneeded, 0.0))


def keep_min_p(probabilities_bv: Tensor, p: float) -> Tensor:
    """0 for all tokens of each row with less than p times its largest probability; not normalised again."""
    if p == 0.0:
        return probabilities_bv
    return probabilities_bv.masked_fill(probabilities_bv < p * probabilities_bv.amax(dim=-1, keepdim=True), 0.0)


def pick(weights_bv: Tensor, draws_b: Tensor) -> Tensor:
    """For each row the id whose interval of the cumulated weights holds draw x total: id i has probability weight i / total."""
    cumulated = weights_bv.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulated, draws_b[:, None] * cumulated[:, -1:], right=True)
    return index[:, 0].clamp(max=weights_bv.shape[-1] - 1)
