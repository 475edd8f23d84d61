"""Sampling as small pure functions, and generation with a key/value cache."""

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from megagpt.checkpoint.load_model import LoadedModel
from megagpt.config import Config
from megagpt.data.permutation import mix
from megagpt.model.gpt import KeyValues, ModelConfig
from megagpt.tokenizer.base import Tokenizer, prompt_ids

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
    repetition_penalty: float = Field(default=1.0, ge=1)
    """Divides positive logits of tokens already there and multiplies negative ones (arXiv 1909.05858); 1 = off."""
    seed: int = 0
    """The same seed gives the same text. Row i of a batch draws from a stream of its own."""
    stop_at_eot: bool = True
    """End a text at an end-of-text token."""


@torch.inference_mode()
def stream_texts(loaded: LoadedModel, prompts: Sequence[str], sampling: SamplingConfig) -> Iterator[tuple[int, str]]:
    """(index of the prompt, piece of text) for every piece; the prompts themselves are not repeated.

    Prompts that have equally many tokens are computed together, the others one after another.
    """
    tokenizer, device = loaded.tokenizer, next(loaded.model.parameters()).device
    by_length: dict[int, list[int]] = {}
    all_ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for i, ids in enumerate(all_ids):
        by_length.setdefault(len(ids), []).append(i)
    for rows in by_length.values():
        decoders = [StreamDecoder(tokenizer, at_start=not prompts[i]) for i in rows]
        ids_bt = torch.tensor([all_ids[i] for i in rows], device=device)
        eos_ids = tokenizer.eos_ids if sampling.stop_at_eot else ()
        steps = generate_ids(
            loaded.model, loaded.model_config, ids_bt, sampling, vocab_size=tokenizer.vocab_size, eos_ids=eos_ids, streams=rows
        )
        for tokens in steps:
            for row, decoder, token in zip(rows, decoders, tokens, strict=True):
                text = decoder.push(token) if token is not None else ""
                if text:
                    yield row, text
        for row, decoder in zip(rows, decoders, strict=True):
            rest = decoder.finish()
            if rest:
                yield row, rest


@torch.no_grad()
def generate_ids(
    model: Callable[..., Tensor],
    config: ModelConfig,
    ids_bt: Tensor,
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    eos_ids: Collection[int] = (),
    streams: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """After each forward the next token of every row of `ids_bt` [B, T], None for rows that have ended at one of `eos_ids`.

    `vocab_size`: ids from there on (padding of the embedding) are never drawn. `streams`: number of each row's random stream;
    None = 0, 1, …. With eot_id None every call makes exactly max_tokens forwards, which ranks that share a model need. When
    the model's seq_len is full, generation continues from its last half, with positions counted from 0 again. Put the model in
    evaluation mode first.
    """
    generators = [torch.Generator().manual_seed(mix(sampling.seed, i) >> 1) for i in streams or range(len(ids_bt))]
    cache = [KeyValues() for _ in range(config.num_layers)]
    all_ids, new_ids = ids_bt, ids_bt[:, -config.seq_len :]
    ended = [False] * len(ids_bt)
    for _ in range(sampling.max_tokens):
        if len(cache[0]) + new_ids.shape[1] > config.seq_len:
            cache = [KeyValues() for _ in range(config.num_layers)]
            new_ids = all_ids[:, -max(1, config.seq_len // 2) :]
        logits_bv = model(new_ids, cache=cache)[:, -1, :vocab_size].float()
        draws_b = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        new_ids = next_token(logits_bv, all_ids, draws_b.to(logits_bv.device), sampling)[:, None]
        all_ids = torch.cat((all_ids, new_ids), dim=1)
        tokens = new_ids[:, 0].tolist()
        ended = [done or token in eos_ids for done, token in zip(ended, tokens, strict=True)]
        yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return


def next_token(logits_bv: Tensor, ids_bt: Tensor, draws_b: Tensor, sampling: SamplingConfig) -> Tensor:
    """The next id of each row, [B], from its logits [B, V], the ids before it, and a number drawn from [0, 1)."""
    logits_bv = penalise_repetition(logits_bv, ids_bt, sampling.repetition_penalty)
    if sampling.temperature == GREEDY:
        return logits_bv.argmax(dim=-1)
    device = drawing_device(logits_bv.device)
    logits_bv = keep_top_k(logits_bv.to(device) / sampling.temperature, sampling.top_k)
    return pick(keep_top_p(logits_bv.softmax(dim=-1), sampling.top_p), draws_b.to(device)).to(ids_bt.device)


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


def pick(weights_bv: Tensor, draws_b: Tensor) -> Tensor:
    """For each row the id whose interval of the cumulated weights holds draw x total: id i has probability weight i / total."""
    cumulated = weights_bv.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulated, draws_b[:, None] * cumulated[:, -1:], right=True)
    return index[:, 0].clamp(max=weights_bv.shape[-1] - 1)


class StreamDecoder:
    """Tokens to text, one at a time: a character is returned when its last byte is known; invalid UTF-8 becomes U+FFFD.

    `at_start`: the tokens begin a document, so that a tokenizer's dummy prefix is left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        self._pieces, self._drop_space = tokenizer.token_bytes(), at_start and tokenizer.dummy_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        piece = self._pieces[token]
        if self._drop_space and piece:
            piece, self._drop_space = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)
