"""Context parallelism: the ranks of a group hold parts of the same samples, and exchange what attention needs of the others.

The model gets whole samples and takes its part of the tokens (`of`), so everything but attention works on T / n tokens, the
chunked loss included. In attention either way is exact, within documents too, because the mask is the whole sample's:

    ulysses   tokens for heads: a rank attends with H / n heads over all T tokens (DeepSpeed Ulysses, arXiv 2309.14509)
    gather    a rank attends with its T / n queries over the keys and values of all T tokens (Llama 3, arXiv 2407.21783, 3.3.2);
              of 2n chunks it has number r and 2n - 1 - r, since under a causal mask later queries cost more

Gradients follow from autograd: each rank has the loss of its own tokens, and the engines sum over all ranks.
Shape letters as in gpt.py; n ranks in a group.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed._functional_collectives as collectives  # traceable by torch.compile, with gradients
from torch import Tensor

from megagpt.config import UserError
from megagpt.model.attention import Mask, attend, attention_mask

ContextParallelMethod: TypeAlias = Literal["ulysses", "gather"]


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """This rank's part of its group's samples."""

    method: ContextParallelMethod
    rank: int
    size: int
    group: Any
    """torch's process group of these ranks."""

    def runs(self, length: int) -> list[tuple[int, int]]:
        """(start, tokens) of each run of consecutive tokens that this rank has of a sample of `length`, in order."""
        if self.method == "ulysses":
            return [(self.rank * (length // self.size), length // self.size)]
        tokens = length // (2 * self.size)
        return [(self.rank * tokens, tokens), ((2 * self.size - 1 - self.rank) * tokens, tokens)]

    def of(self, x_bt: Tensor) -> Tensor:
        """This rank's tokens of whole samples, [B, T] -> [B, T / n]."""
        return torch.cat([x_bt[:, start : start + tokens] for start, tokens in self.runs(x_bt.shape[1])], dim=1)

    def mask(self, length: int, doc_lengths: Tensor | None, device: torch.device, *, blockwise: bool) -> "GroupMask":
        """Where attention is allowed, for `attend_in_group`; arguments as of attention_mask, for the whole samples."""
        if self.method == "ulysses":
            return GroupMask(attention_mask(0, length, doc_lengths, device, blockwise=blockwise), self)
        rows = torch.cat([torch.arange(start, start + tokens, device=device) for start, tokens in self.runs(length)])
        return GroupMask(attention_mask(0, length, doc_lengths, device, blockwise=blockwise, rows=rows), self)


@dataclass(frozen=True, slots=True)
class GroupMask:
    """A mask for samples that are spread over a group: with ulysses [.., T, T], with gather [.., T / n, T]."""

    mask: Mask
    across: ContextParallel


def attend_in_group(q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, spread: GroupMask) -> Tensor:
    """As `attend`, of queries, keys and values of this rank's T / n tokens; all ranks of the group call it together."""
    across = spread.across
    if across.method == "gather":
        return attend(q_bhte, _all_tokens(k_bkte, across), _all_tokens(v_bkte, across), spread.mask)
    # Fewer key/value heads than ranks, or not a multiple of them: each is repeated as often as it takes.
    repeats = math.lcm(k_bkte.shape[1], across.size) // k_bkte.shape[1]
    if repeats > 1:
        k_bkte, v_bkte = (x.repeat_interleave(repeats, dim=1) for x in (k_bkte, v_bkte))
    q, k, v = (_swap(x, across, cut=1, join=2) for x in (q_bhte, k_bkte, v_bkte))
    return _swap(attend(q, k, v, spread.mask), across, cut=2, join=1)


def _swap(x: Tensor, across: ContextParallel, *, cut: int, join: int) -> Tensor:
    """Cut along one dimension, a part for each rank; join the parts that come along another: heads for tokens, and back."""
    return torch.cat(_exchange(torch.stack(x.chunk(across.size, dim=cut)), across), dim=join)


def _all_tokens(x_bkte: Tensor, across: ContextParallel) -> Tensor:
    """Keys or values of all tokens in their order, [B, K, T, E].

    The gradient of the expansion adds the ranks' gradients up on this rank, in fp32 also where they are bf16, and in the same
    order each time: a reduce-scatter would round every partial sum.
    """
    parts = _exchange(x_bkte.expand(across.size, *x_bkte.shape).contiguous(), across)
    halves = [part.chunk(2, dim=2) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=2)


def _exchange(parts: Tensor, across: ContextParallel) -> tuple[Tensor, ...]:
    """parts[i] goes to rank i of the group; what came from each rank."""
    return collectives.all_to_all_single_autograd(parts, None, None, across.group).unbind()


def refuse_context_parallel(
    size: int, method: ContextParallelMethod, *, num_heads: int, seq_len: int, dropout: float, canonical: bool
) -> None:
    """Raise UserError where a model or its samples cannot be shared by `size` ranks, with what would fit."""
    if size == 1:
        return
    name = f"engine.context_parallel_size={size}"
    if method == "ulysses" and num_heads % size:
        fitting = ", ".join(str(heads) for heads in range(2, num_heads + 1) if num_heads % heads == 0)
        raise UserError(
            f"{name} with context_parallel_method=ulysses: model.num_heads={num_heads} is not a multiple of it; sizes that "
            f"fit: {fitting or 'none'}. engine.context_parallel_method=gather takes any number of heads"
        )
    parts = size if method == "ulysses" else 2 * size
    if seq_len % parts:
        raise UserError(
            f"{name} with context_parallel_method={method}: data.seq_len={seq_len} is not a multiple of {parts}; "
            f"{max(1, seq_len // parts) * parts} is"
        )
    if dropout:
        raise UserError(f"{name} with model.dropout={dropout}: which activations are dropped would depend on the ranks; set 0")
    if canonical:
        raise UserError(f"{name} with determinism=canonical: its order of sums is that of whole samples; use strict")
