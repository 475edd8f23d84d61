"""A static key/value cache: slots for sequences, each with positions of its own, allocated once.

Shape letters as in gpt.py; S slots, L tokens that a slot holds at most, W tokens that are looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of one attention layer: two [S, K, L, E] tensors, allocated by the first forward."""

    def __init__(self, num_slots: int, max_tokens: int) -> None:
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.first_slot, self.start, self.width = 0, 0, 0
        self.positions_bt: Tensor | None = None

    def extend(self, keys_bkte: Tensor, values_bkte: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; returns views [B, K, W, E] of all that their rows may look at."""
        batch, heads, length, size = keys_bkte.shape
        if self.keys is None or self.values is None:
            # Zeros: a masked position has weight 0, and 0 times what uninitialised memory may hold (nan) is not 0.
            shape = (self.num_slots, heads, self.max_tokens, size)
            self.keys, self.values = keys_bkte.new_zeros(shape), values_bkte.new_zeros(shape)
        last_slot = self.first_slot + batch
        for store, new in ((self.keys, keys_bkte), (self.values, values_bkte)):
            if self.positions_bt is None:
                store[self.first_slot : last_slot, :, self.start : self.start + length] = new
            else:
                rows_b1 = torch.arange(self.first_slot, last_slot, device=new.device)[:, None]
                store[rows_b1, :, self.positions_bt] = new.transpose(1, 2)
        view = slice(self.first_slot, last_slot), slice(None), slice(0, self.width)
        return self.keys[view], self.values[view]


class Cache:
    """The caches of all layers, and how many tokens each slot holds."""

    def __init__(self, num_layers: int, num_slots: int, max_tokens: int) -> None:
        self.layers = [KeyValues(num_slots, max_tokens) for _ in range(num_layers)]
        self.lengths, self.max_tokens = [0] * num_slots, max_tokens
        self.positions_bt: Tensor | None = None
        """Where the tokens of this forward go, if that differs between its rows."""

    def place(self, first_slot: int, batch: int, length: int, device: torch.device) -> int:
        """Say where the next forward's tokens go: `length` more in each of `batch` slots. Returns the start in the longest.

        Raises ValueError if a slot is full, or there is none.
        """
        starts = self.lengths[first_slot : first_slot + batch]
        if len(starts) != batch:
            raise ValueError(f"{batch} rows from slot {first_slot} on: the cache has {len(self.lengths)} slots")
        width = max(starts) + length
        if width > self.max_tokens:
            raise ValueError(f"{width} tokens are more than the {self.max_tokens} that the cache holds")
        self.positions_bt = None
        if min(starts) != max(starts):
            self.positions_bt = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        for layer in self.layers:
            layer.first_slot, layer.start, layer.width, layer.positions_bt = first_slot, starts[0], width, self.positions_bt
        return max(starts)

    def advance(self, first_slot: int, batch: int, length: int) -> None:
        """Count what a forward has stored."""
        for slot in range(first_slot, first_slot + batch):
            self.lengths[slot] += length

    def move(self, source: int, target: int) -> None:
        """Put the tokens of slot `source` into slot `target`."""
        length = self.lengths[target] = self.lengths[source]
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[target, :, :length] = store[source, :, :length]

    def clear(self, slots: Sequence[int]) -> None:
        """Forget the tokens of some slots."""
        for slot in slots:
            self.lengths[slot] = 0


def ragged_mask(positions_bt: Tensor, width: int) -> Tensor:
    """[B, 1, T, W]: each token looks at those of its slot up to its own position."""
    return (torch.arange(width, device=positions_bt.device) <= positions_bt[..., None])[:, None]
