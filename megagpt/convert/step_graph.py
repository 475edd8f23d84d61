"""The model as one function of tensors for graph compilers: token ids and the cache of earlier tokens in, logits and cache out.

`GPT.forward` branches on sizes, which fixes them in an exported graph without an error. `StepGPT` has no branch: its mask is
explicit, positions count from the length of the cache, and key/value heads are repeated. Its modules are those of the model.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.convert.compare_logits import CHUNK, LONG, TOLERANCE, Comparison, ConversionError, compare_with, sample_ids
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.model.rope import rope_frequencies, rotate

StepFunction = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
"""(ids [B, T], past) to (logits [B, T, V], present); past and present: key and value of each layer, [B, K, tokens, E]."""
GREEDY_TOKENS = 64
"""Tokens of the text that a graph must generate as the model does."""


class StepGPT(nn.Module):
    """ids [B, T] behind `past` (key_0, value_0, key_1, ..., each [B, K, P, E], P may be 0) -> logits [B, T, V] and the cache
    [B, K, P + T, E] of each layer. Logits of ids from `vocab_size` on are left out."""

    frequencies: Tensor

    def __init__(self, model: GPT, vocab_size: int) -> None:
        super().__init__()
        self.model, self.vocab_size = model, vocab_size
        config = model.config
        frequencies, self.sharpness = torch.zeros(0), 1.0
        if config.family == "llama":
            frequencies, self.sharpness = rope_frequencies(
                config.head_width, config.rope_theta, config.rope_scaling, torch.device("cpu")
            )
        self.register_buffer("frequencies", frequencies)

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        model, config = self.model, self.model.config
        (batch, length), start = ids.shape, past[0].shape[2]
        positions = torch.arange(length, device=ids.device) + start
        x_btd, rope_2te = model.embedding(ids), None
        if model.positions is not None:
            x_btd = x_btd + model.positions(positions)
        else:
            angles_te = torch.outer(positions.float(), self.frequencies)
            rope_2te = torch.stack((angles_te.cos(), angles_te.sin())) * self.sharpness
        mask_ts = torch.arange(start + length, device=ids.device)[None, :] <= positions[:, None]
        groups, present = config.num_heads // config.kv_heads, []
        for i, block in enumerate(model.blocks):
            part: Any = block
            attention, h_btd = part.attention, part.attention_norm(x_btd)
            q, k, v = (
                project(h_btd).view(batch, length, -1, config.head_width)
                for project in (attention.query, attention.key, attention.value)
            )
            q, k, v = attention.query_norm(q).transpose(1, 2), attention.key_norm(k).transpose(1, 2), v.transpose(1, 2)
            if rope_2te is not None:
                q, k = rotate(q, rope_2te), rotate(k, rope_2te)
            k, v = torch.cat((past[2 * i], k), dim=2), torch.cat((past[2 * i + 1], v), dim=2)
            present += [k, v]
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            y_bhte = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ts)
            x_btd = x_btd + attention.out(y_bhte.transpose(1, 2).reshape(batch, length, config.num_heads * config.head_width))
            x_btd = x_btd + part.mlp(part.mlp_norm(x_btd))
        return F.linear(model.norm(x_btd), model.head.weight[: self.vocab_size]), *present


def empty_past(config: ModelConfig, batch: int) -> list[Tensor]:
    """The cache before the first token."""
    return [torch.zeros(batch, config.kv_heads, 0, config.head_width) for _ in range(2 * config.num_layers)]


def cache_names(config: ModelConfig) -> list[str]:
    """key_0, value_0, key_1 ...: the order of a cache's tensors."""
    return [f"{kind}_{i}" for i in range(config.num_layers) for kind in ("key", "value")]


def example_inputs(config: ModelConfig) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Inputs to trace StepGPT with, and the sizes that vary: batch, length and length of the cache."""
    batch, past, length = 2, 5, 3
    ids = torch.arange(batch * length).view(batch, length) % config.vocab_size
    caches = [torch.randn(batch, config.kv_heads, past, config.head_width) for _ in range(2 * config.num_layers)]
    dim, most = torch.export.Dim, max(config.seq_len, 8)
    batch_dim, length_dim, past_dim = dim("batch", min=1), dim("length", min=1, max=most), dim("past", min=0, max=most)
    cache_dims = tuple({0: batch_dim, 2: past_dim} for _ in caches)
    return (ids, *caches), {"ids": {0: batch_dim, 1: length_dim}, "past": cache_dims}


@torch.no_grad()
def compare_step(model: GPT, step: StepFunction, vocab_size: int, first_id: int) -> tuple[Comparison, list[int]]:
    """How close a graph is to the model, and the greedy text of both: all positions at once, through its cache in chunks, in
    batches of other sizes than it was traced with. Raises ConversionError where logits or greedy tokens differ."""
    config = model.config
    found = compare_with(model, lambda ids: step(ids, empty_past(config, len(ids)))[0], vocab_size)
    length = min(config.seq_len, LONG)
    ids = sample_ids(vocab_size, length, seed=3)[1:].expand(3, -1)
    whole = model(ids[:1])[0, :, :vocab_size]
    past, parts, ends = empty_past(config, 3), [], [*range(CHUNK, length, CHUNK), length]
    ends = [1, *ends] if ends[0] > 1 else ends
    for begin, end in pairwise([0, *ends]):
        logits, past = step(ids[:, begin:end], past)
        parts.append(logits[2])
    difference = float((torch.cat(parts) - whole).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(whole.abs().max())):
        raise ConversionError(
            f"logits through the cache differ by {difference:.3g} where the largest is {whole.abs().max():.3g}"
        )
    count = min(GREEDY_TOKENS, config.seq_len)
    sampling = SamplingConfig(max_tokens=count, temperature=0.0)
    steps = generate_ids(model, config, torch.tensor([[first_id]]), sampling, vocab_size=vocab_size)
    expected = [int(tokens[0] or 0) for tokens in steps]
    greedy = greedy_ids(step, config, [first_id], count)
    if greedy != expected:
        place = next(i for i, pair in enumerate(zip(greedy, expected, strict=True)) if pair[0] != pair[1])
        raise ConversionError(f"greedy token {place} is {greedy[place]}, the model's is {expected[place]}")
    return found, greedy


def greedy_ids(step: StepFunction, config: ModelConfig, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest ids behind a prompt; prompt and text may be seq_len + 1 together."""
    ids, past, found = torch.tensor([list(prompt)]), empty_past(config, 1), []
    for _ in range(count):
        logits, past = step(ids, past)
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        found.append(int(ids))
    return found
