"""Samples of another length in the middle of an epoch: the tokens not used yet are cut again, and none is used twice.

The order of an epoch permutes blocks of `shuffle_block` consecutive samples (dataset.py). Blocks that have given no sample yet
are whole runs of tokens: they keep their places in the order, and each is cut into samples of the new length. Left out until
the next epoch are the rest of the block that was being read, and at the end of each block less than a new sample. All of it is
computed from the lengths and the numbers of samples given (state.Cut), nothing is stored.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.data.permutation import mix, permute, unpermute
from megagpt.data.state import Cut


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of `seq_len` + 1 tokens of a split, in blocks of `block`; the last block may be shorter."""

    num_tokens: int
    seq_len: int
    stride: int
    block: int

    @property
    def length(self) -> int:
        """How many there are."""
        return max(0, (self.num_tokens - self.seq_len - 1) // self.stride + 1)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.length // self.block)

    @property
    def short_by(self) -> int:
        """Windows that the last block lacks."""
        return self.num_blocks * self.block - self.length

    def place(self, position: int, key: int) -> tuple[int, int]:
        """(which block of the order, which window in it) comes at `position` of an epoch."""
        if self.short_by:
            # Positions behind the short block are counted as if it were full.
            short_at = unpermute(self.num_blocks - 1, self.num_blocks, key)
            if position >= short_at * self.block + self.block - self.short_by:
                position += self.short_by
        return divmod(position, self.block)

    def window(self, position: int, key: int) -> int:
        """The number of the window at `position` of an epoch."""
        block, inside = self.place(position, key)
        return permute(block, self.num_blocks, key) * self.block + inside


class Rest:
    """The blocks of an epoch from the one number `first` of the order on, cut into samples of `seq_len` tokens."""

    def __init__(self, windows: Windows, key: int, first: int, seq_len: int) -> None:
        self.windows, self.key, self.first, self._seq_len = windows, key, first, seq_len
        self._per_block = windows.block * windows.seq_len // seq_len
        self._lost = 0
        """Samples that the short block has less than the others, if it is still to come."""
        self._short_at = unpermute(windows.num_blocks - 1, windows.num_blocks, key)
        if self._short_at >= first:
            self._lost = self._per_block - (windows.block - windows.short_by) * windows.seq_len // seq_len
        self.length = (windows.num_blocks - first) * self._per_block - self._lost

    def place(self, index: int) -> tuple[int, int]:
        """(which block of the order, which sample in it) sample `index` < length is."""
        if self._lost and index >= (self._short_at - self.first + 1) * self._per_block - self._lost:
            index += self._lost
        block, inside = divmod(index, self._per_block)
        return self.first + block, inside

    def first_token(self, index: int) -> int:
        """Where sample `index` < length begins in the split's tokens."""
        block, inside = self.place(index)
        number = permute(block, self.windows.num_blocks, self.key)
        return number * self.windows.block * self.windows.seq_len + inside * self._seq_len


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source is after changes of length: from its sample `begin` on it gives `rest`, then whole epochs from `epoch`."""

    begin: int
    rest: Rest | None
    epoch: int


def place_after(cuts: Sequence[Cut], num_tokens: int, seed: int) -> Place:
    """Follow a source through its cuts, oldest first; the last one is today's."""
    rest, epoch = None, 0
    for before, after in itertools.pairwise(cuts):
        windows = Windows(num_tokens, before.seq_len, before.seq_len, before.shuffle_block)
        given = after.from_index - before.from_index
        if rest is not None and given < rest.length:
            first = rest.place(given - 1)[0] + 1 if given else rest.first
            rest = Rest(rest.windows, rest.key, first, after.seq_len)
            continue
        more, position = divmod(given - (rest.length if rest is not None else 0), windows.length)
        epoch, rest = epoch + more, None
        if position:
            key = mix(seed, epoch)
            rest, epoch = Rest(windows, key, windows.place(position - 1, key)[0] + 1, after.seq_len), epoch + 1
    return Place(cuts[-1].from_index, rest, epoch)
