"""Causal attention, within documents if their lengths are given: torch's fused kernels; for documents on GPUs flex attention.

Shape letters as in gpt.py: B sequences, T tokens, H query heads, K key/value heads, E head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

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
    rows = positions if rows is None else rows
    if doc_lengths is None:
        document = torch.zeros(1, length, dtype=torch.int64, device=device)
    else:
        ends = doc_lengths.cumsum(dim=1)
        document = torch.searchsorted(ends, positions.expand(len(ends), -1).contiguous(), right=True)
    if blockwise:
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[b, rows[q]] == document[b, k]) & (rows[q] >= k)

        return create_block_mask(allowed, len(document), None, len(rows), length, device=str(device))
    causal = rows[:, None] >= positions
    return ((document[:, rows, None] == document[:, None, :]) & causal)[:, None]


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Flex attention; on a GPU compiled, since otherwise it holds all scores. Inside a compiled block it becomes part of it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention
