"""Causal attention, within documents if their lengths are given: torch's fused kernels; for documents on GPUs flex attention.

Shape letters as in gpt.py: B sequences, T tokens, H query heads, K key/value heads, E head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

FLEX_BLOCK = 128
"""Tokens of a side of a BlockMask's blocks, torch's default."""

Mask: TypeAlias = Any
"""None: plain causal. A bool tensor: True where attention is allowed, broadcast to [B, H, T, T]. Or a BlockMask."""


def attend(q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: Mask, *, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(E)) v under `mask`, [B, H, T, E]; query heads share key/value heads in groups of H / K."""
    grouped = q_bhte.shape[1] != k_bkte.shape[1]
    if mask is None or isinstance(mask, Tensor):
        causal = mask is None
        return F.scaled_dot_product_attention(
            q_bhte, k_bkte, v_bkte, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: flex attention has none; attention_mask gives a tensor for it")
    return _flex_attention(q_bhte.device.type)(q_bhte, k_bkte, v_bkte, block_mask=mask, enable_gqa=grouped)


def attention_mask(
    start: int,
    length: int,
    doc_lengths: Tensor | None,
    device: torch.device,
    *,
    blockwise: bool = False,
    rows: Tensor | None = None,
) -> Mask:
    """Where `length` tokens behind `start` others may look: [T, start + T], with documents [B, 1, T, T]; None = plain causal.

    `blockwise` with documents: a BlockMask instead (arXiv 2412.05496), which skips pairs of different documents and holds no
    [T, T] array; it needs a GPU for the backward pass. `rows`: positions of the queries, where they are only some of the
    tokens (`start` is 0): [B, 1, rows, T], or a BlockMask, with and without documents.
    """
    if doc_lengths is None and rows is None:
        if start == 0:
            return None
        return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(diagonal=start)
    positions = torch.arange(length, device=device)
    every, rows = rows is None, positions if rows is None else rows
    if doc_lengths is None:
        document = torch.zeros(1, length, dtype=torch.int64, device=device)
    else:
        ends = doc_lengths.cumsum(dim=1)
        document = torch.searchsorted(ends, positions.expand(len(ends), -1).contiguous(), right=True)
    if blockwise:
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[b, rows[q]] == document[b, k]) & (rows[q] >= k)

        if every:
            return document_blocks(document, allowed)
        return create_block_mask(allowed, len(document), None, len(rows), length, device=str(device))
    causal = rows[:, None] >= positions
    return ((document[:, rows, None] == document[:, None, :]) & causal)[:, None]


def document_blocks(document_bt: Tensor, allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """The BlockMask that create_block_mask makes of `allowed`, causal inside documents, from the blocks' first and last tokens
    alone: no [B, T, T] array is held. document_bt: the number of each token's document, which never decreases."""
    from torch.nn.attention.flex_attention import BlockMask

    length = document_bt.shape[1]
    starts = torch.arange(0, length, FLEX_BLOCK, device=document_bt.device)
    ends = (starts + FLEX_BLOCK - 1).clamp(max=length - 1)
    first_bn, last_bn = document_bt[:, starts], document_bt[:, ends]
    query, key = torch.arange(len(starts), device=starts.device)[:, None], torch.arange(len(starts), device=starts.device)
    # A block of earlier keys ends in the document in which that of the queries begins, or they have none in common.
    shared_bnn = (key == query) | ((key < query) & (last_bn[:, None, :] == first_bn[:, :, None]))
    full_bnn = (key < query) & (first_bn[:, None, :] == last_bn[:, :, None])
    full_bnn &= query < length // FLEX_BLOCK  # the last block may be cut short
    some, full = (_numbered(x[:, None]) for x in (shared_bnn & ~full_bnn, full_bnn))
    return BlockMask.from_kv_blocks(*some, *full, BLOCK_SIZE=FLEX_BLOCK, mask_mod=allowed, seq_lengths=(length, length))


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many blocks are set, and the numbers of all of them, those that are set first."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Flex attention; on a GPU compiled, since otherwise it holds all scores. Inside a compiled block it becomes part of it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention
