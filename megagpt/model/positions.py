"""Positions of tokens in samples that hold several documents."""

import torch
from torch import Tensor


def document_positions(doc_lengths: Tensor, length: int) -> Tensor:
    """[B, T] int64: each token's distance from the start of its document.

    doc_lengths: [B, documents], padded with zeros, each row summing to `length`.
    """
    ends_bd = doc_lengths.cumsum(dim=1)
    places_bt = torch.arange(length, device=doc_lengths.device).expand(len(doc_lengths), -1)
    document_bt = torch.searchsorted(ends_bd, places_bt.contiguous(), right=True)
    return places_bt - (ends_bd - doc_lengths).gather(1, document_bt)
