"""Sample number i as tokens: datasets, mixtures and the position of a run, computed from manifests and seed. Needs no torch.

    global sample index  --Mixture-->  source, index in it  --TokenDataset-->  epoch, keyed permutation, window of tokens

Nothing is stored: order costs no memory, no file and no start-up, and a sample is a pure function of its index.
"""

import bisect
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megagpt.data.permutation import mix
from megagpt.data.recut import Place, Windows, place_after
from megagpt.data.shards import Manifest, Shard, ShardError, open_shard, read_manifest
from megagpt.data.state import Cut
from megagpt.documents import IGNORE


@dataclass(frozen=True, slots=True)
class Sample:
    """seq_len inputs and their targets."""

    inputs: np.ndarray
    """(seq_len,) int64."""
    targets: np.ndarray
    """(seq_len,) int64, IGNORE where there is no loss."""
    doc_lengths: np.ndarray
    """(documents,) int32, summing to seq_len; a document ends with its end-of-text token."""


class Dataset(Protocol):
    """Samples by index; pure in (manifest, seed, index)."""

    def __len__(self) -> int:
        """Samples in one epoch."""
        ...

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; beyond the length further epochs follow, each in its own order."""
        ...


class TokenDataset:
    """Windows of seq_len + 1 tokens over the concatenated shards of one split. Opening reads the manifest and nothing else.

    The order of an epoch permutes blocks of `shuffle_block` consecutive windows; the last, shorter block goes where the
    permutation puts it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seq_len: int,
        seed: int = 0,
        stride: int | None = None,
        shuffle_block: int = 64,
        document_end_loss: bool = True,
        base_seed: int = 0,
    ) -> None:
        """document_end_loss: whether the first token of a document is a target after the end of the one before it.
        base_seed: from which `with_number` computes the seed."""
        self.directory, self.seq_len, self.stride = Path(directory), seq_len, stride or seq_len
        self.seed, self.shuffle_block, self.document_end_loss = seed, shuffle_block, document_end_loss
        self.base_seed = base_seed
        self.manifest: Manifest = read_manifest(self.directory)
        self.num_tokens = self.manifest.tokens
        self._starts = [0]
        for info in self.manifest.shards:
            self._starts.append(self._starts[-1] + info.tokens)
        self._shards: dict[int, Shard] = {}
        self._offsets: dict[int, np.ndarray] = {}
        self._windows = Windows(self.num_tokens, seq_len, self.stride, shuffle_block)
        if self.manifest.supervised is not None:  # their last target is not in the next sample
            self._refuse_other_samples()
            self._windows = Windows(self.num_tokens + 1, seq_len, self.stride, shuffle_block)
        self._length = self._windows.length
        self._place = Place(0, None, 0)

    def __len__(self) -> int:
        return self._length

    def with_number(self, number: int, cuts: Sequence[Cut] = ()) -> "TokenDataset":
        """The same tokens in the order of another number of a source (see open_data), after other lengths of samples."""
        other = copy.copy(self)
        other.seed = mix(self.base_seed, number)
        if cuts:
            other._place = place_after(cuts, self.num_tokens, other.seed)
        return other

    def sample(self, index: int) -> Sample:
        """Sample `index` of the endless shuffled sequence. Raises ShardError on damaged shards."""
        return self._window(self.first_token(index))

    def first_token(self, index: int) -> int:
        """Where sample `index` begins in the split's tokens. Raises ValueError for one of another length."""
        begin, rest = self._place.begin, self._place.rest
        if index < begin:
            raise ValueError(f"sample {index} is of another length than the {self.seq_len} tokens since sample {begin}")
        if rest is not None and index < begin + rest.length:
            return rest.first_token(index - begin)
        epoch, position = divmod(index - begin - (rest.length if rest is not None else 0), self._length)
        return self._windows.window(position, mix(self.seed, self._place.epoch + epoch)) * self.stride

    def num_windows(self) -> int:
        """Windows of `window`: consecutive, each token but the first is a target once."""
        return max(0, -(-(self.num_tokens - 1) // self.seq_len))

    def window(self, index: int) -> Sample:
        """Window `index` in the order of the shards, for validation; the last one is filled up with IGNORE targets."""
        return self._window(index * self.seq_len)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) tokens of the split from `start`, across shards, fewer at its end; int64."""
        count = min(count, self.num_tokens - start)
        pieces, number = [], bisect.bisect_right(self._starts, start) - 1
        while count > 0:
            offset = start - self._starts[number]
            take = min(count, self.manifest.shards[number].tokens - offset)
            pieces.append(self._shard(number).read(offset, take))
            start, count, number = start + take, count - take, number + 1
        return np.concatenate(pieces).astype(np.int64)

    def document(self, token: int) -> tuple[Path, int, int]:
        """(shard's .docs.parquet, row in it, first token in the split) of the document that holds a token of the split."""
        number = bisect.bisect_right(self._starts, token) - 1
        offsets = self._shard(number).document_offsets()
        row = int(np.searchsorted(offsets, token - self._starts[number], side="right")) - 1
        path = self.directory / f"{self.manifest.shards[number].name}.docs.parquet"
        return path, row, self._starts[number] + int(offsets[row])

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = open_shard(self.directory, self.manifest.shards[number], self.manifest.dtype)
        return self._shards[number]

    def _refuse_other_samples(self) -> None:
        """Raise ShardError if rows of fine-tuning data are read in samples that would cut them."""
        packed = self.manifest.pack_seq_len
        if (self.seq_len, self.stride) != (packed, packed):
            raise ShardError(
                f"{self.directory}: its samples have {packed} tokens (tokenize.pack_seq_len); data.seq_len="
                f"{self.seq_len} with a stride of {self.stride} would cut them: set data.seq_len={packed} or tokenize again"
            )

    def _sample_of_rows(self, start: int) -> Sample:
        """Whole rows of fine-tuning data: targets by the shard's mask, rows as its index has them. A sample is in one shard."""
        number = bisect.bisect_right(self._starts, start) - 1
        shard, offset = self._shard(number), start - self._starts[number]
        inputs = shard.read(offset, self.seq_len).astype(np.int64)
        targets, is_target = np.full(self.seq_len, IGNORE), shard.targets(offset, self.seq_len)
        targets[:-1] = np.where(is_target[1:], inputs[1:], IGNORE)
        if self.manifest.classes:
            inputs[is_target] = self.manifest.eot_id  # a number of a class is no token
        if number not in self._offsets:
            self._offsets[number] = shard.document_offsets()
        offsets = self._offsets[number]
        first, last = np.searchsorted(offsets, (offset, offset + self.seq_len))
        return Sample(inputs, targets, np.diff(offsets[first : last + 1]).astype(np.int32))

    def _window(self, start: int) -> Sample:
        if self.manifest.supervised is not None:
            return self._sample_of_rows(start)
        tokens = self.tokens(start, self.seq_len + 1)
        inputs, targets = tokens[:-1], tokens[1:]
        missing = self.seq_len - len(inputs)
        if missing:
            inputs = np.concatenate([inputs, np.full(missing, self.manifest.eot_id)])
            targets = np.concatenate([targets, np.full(missing, IGNORE)])
        if not self.document_end_loss:
            targets = np.where(inputs == self.manifest.eot_id, IGNORE, targets)
        ends = np.flatnonzero(inputs == self.manifest.eot_id) + 1
        ends = ends[ends < self.seq_len]
        lengths = np.diff(np.concatenate([[0], ends, [self.seq_len]]))
        return Sample(inputs, targets, lengths.astype(np.int32))
