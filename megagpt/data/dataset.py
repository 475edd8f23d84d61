"""Which tokens are sample number i: datasets, mixtures and the position of a run, computed from manifests and seed. No torch.

    global sample index  --Mixture-->  source, index in it  --TokenDataset-->  epoch, keyed permutation, window of tokens

Nothing is stored: order costs no memory, no file and no start-up, and a sample is a pure function of its index.
"""

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import xxhash
from pydantic import Field, model_validator

from megagpt.config import Config, UserError
from megagpt.data.permutation import mix, permute, unpermute
from megagpt.data.shards import Manifest, Shard, open_shard, read_manifest
from megagpt.documents import IGNORE
from megagpt.files import sha256_file
from megagpt.tokenizer.sentencepiece import Tokenizer, open_tokenizer

HASH_MASK = (1 << 63) - 1
"""The ledger's sums are taken modulo 2^63, so that they fit int64 everywhere."""


class SourceConfig(Config):
    """One corpus to train on."""

    path: Path
    """Folder of tokenized shards, with train/, validation/ and tokenizer/ in it (tools/tokenize_documents.py writes it)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the training samples, relative to the other sources' weights."""


class WeightChange(Config):
    """New weights of the sources, from one sample of the run on."""

    from_sample: int = Field(ge=1)
    """Global sample index: without batch_warmup step s begins at sample s x global_batch_size (and what the guard left out)."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """By source; a source that is not named keeps its weight. 0: nothing is drawn from it."""


class DataConfig(Config):
    """What is trained on, and in which order."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """The corpora by name; validation loss is reported per name."""
    weight_changes: tuple[WeightChange, ...] = ()
    """When the weights of the sources change, in order. What a source has given before is not given again."""
    seq_len: int = Field(default=1024, ge=1)
    """Tokens per sample."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of one sample to the next; null = seq_len, less gives overlapping samples."""
    seed: int = 0
    """Key of the order of samples."""
    shuffle_block: int = Field(default=64, ge=1)
    """Samples that stay together when the order is permuted: long reads for network disks. 1 = every sample on its own, right
    for a small corpus whose documents were not shuffled."""
    mask_documents: bool = False
    """Attention does not cross documents inside a sample."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        starts = [change.from_sample for change in self.weight_changes]
        if starts != sorted(set(starts)):
            raise ValueError(f"weight_changes: from_sample must ascend, not {starts}")
        for change in self.weight_changes:
            unknown = sorted(set(change.weights) - set(self.sources))
            if unknown:
                raise ValueError(f"weight_changes: {unknown[0]!r} is not one of the sources {sorted(self.sources)}")
        for start, weights in self.phases():
            if not any(weights):
                raise ValueError(f"weight_changes: from_sample={start}: every source has weight 0")
        return self

    def phases(self) -> list[tuple[int, list[float]]]:
        """(first sample, weights in the order of the sources) from the start and from each change on."""
        weights = {name: source.weight for name, source in self.sources.items()}
        found = [(0, list(weights.values()))]
        for change in self.weight_changes:
            weights = {**weights, **change.weights}
            found.append((change.from_sample, list(weights.values())))
        return found


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
        self, directory: Path, *, seq_len: int, seed: int = 0, stride: int | None = None, shuffle_block: int = 64
    ) -> None:
        self.directory, self.seq_len, self.stride = Path(directory), seq_len, stride or seq_len
        self.seed, self.shuffle_block = seed, shuffle_block
        self.manifest: Manifest = read_manifest(self.directory)
        self.num_tokens = self.manifest.tokens
        self._starts = [0]
        for info in self.manifest.shards:
            self._starts.append(self._starts[-1] + info.tokens)
        self._shards: dict[int, Shard] = {}
        self._length = max(0, (self.num_tokens - seq_len - 1) // self.stride + 1)

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Sample:
        """Sample `index` of the endless shuffled sequence. Raises ShardError on damaged shards."""
        return self._window(self.first_token(index))

    def first_token(self, index: int) -> int:
        """Where sample `index` begins in the split's tokens."""
        epoch, position = divmod(index, self._length)
        return self._shuffled(position, mix(self.seed, epoch)) * self.stride

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

    def _shuffled(self, position: int, key: int) -> int:
        size, blocks = self.shuffle_block, -(-self._length // self.shuffle_block)
        short_by = blocks * size - self._length
        if short_by:
            # Positions behind the short block are counted as if it were full.
            short_at = unpermute(blocks - 1, blocks, key)
            if position >= short_at * size + size - short_by:
                position += short_by
        return permute(position // size, blocks, key) * size + position % size

    def _window(self, start: int) -> Sample:
        tokens = self.tokens(start, self.seq_len + 1)
        inputs, targets = tokens[:-1], tokens[1:]
        missing = self.seq_len - len(inputs)
        if missing:
            inputs = np.concatenate([inputs, np.full(missing, self.manifest.eot_id)])
            targets = np.concatenate([targets, np.full(missing, IGNORE)])
        ends = np.flatnonzero(inputs == self.manifest.eot_id) + 1
        ends = ends[ends < self.seq_len]
        lengths = np.diff(np.concatenate([[0], ends, [self.seq_len]]))
        return Sample(inputs, targets, lengths.astype(np.int32))


class Mixture:
    """Several datasets as one endless sequence in exact proportions: after any n samples each of S sources has had its share of
    them, give or take half of log2(S), rounded up.

    Computed, not stored: the sources are halved, sample i of the two halves goes to the first one when its share of the first
    i + 1 samples, rounded, is more than its share of i; and so on within the half. Each source counts its own samples, so it
    has epochs of its own. Weights may change at given samples: the proportions then begin anew, each source's count goes on.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], changes: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        self.datasets = tuple(datasets)
        self._starts = [0, *(start for start, _ in changes)]
        self._sums = [_cumulated(values) for values in (weights, *(values for _, values in changes))]
        self._before = [[0] * len(datasets)]
        """Samples that each source has given when a phase begins."""
        for phase, (start, end) in enumerate(itertools.pairwise(self._starts)):
            given = self._counts(end - start, self._sums[phase])
            self._before.append([a + b for a, b in zip(self._before[-1], given, strict=True)])
        sums = self._sums[0]
        shares = [last - first for first, last in itertools.pairwise(sums)]
        self._length = max(-(-len(d) * sums[-1] // share) for d, share in zip(datasets, shares, strict=True) if share)

    def __len__(self) -> int:
        """Samples until every source has been through about once, by the first weights."""
        return self._length

    def sample(self, index: int) -> Sample:
        """Sample `index` of the mixture."""
        source, position = self.locate(index)
        return self.datasets[source].sample(position)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample index in that source) of a sample of the mixture."""
        phase = bisect.bisect_right(self._starts, index) - 1
        index, sums = index - self._starts[phase], self._sums[phase]
        first, last = 0, len(self.datasets)
        while last - first > 1:
            middle = (first + last) // 2
            taken, after = (_share(i, sums, first, middle, last) for i in (index, index + 1))
            if after > taken:
                index, last = taken, middle
            else:
                index, first = index - taken, middle
        return first, self._before[phase][first] + index

    def _counts(self, count: int, sums: list[int], first: int = 0, last: int | None = None) -> list[int]:
        """How many of the first `count` samples of a phase come from each source."""
        last = len(self.datasets) if last is None else last
        if last - first == 1:
            return [count]
        middle = (first + last) // 2
        taken = _share(count, sums, first, middle, last)
        return self._counts(taken, sums, first, middle) + self._counts(count - taken, sums, middle, last)


def _cumulated(weights: Sequence[float]) -> list[int]:
    """0 and the running sums of weights, scaled to integers: decimal fractions stay exact."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [0, *itertools.accumulate(int(weight * scale) for weight in exact)]


def _share(count: int, sums: list[int], first: int, middle: int, last: int) -> int:
    """How many of `count` samples of the sources [first, last) the sources before `middle` have had, rounded."""
    share, whole = sums[middle] - sums[first], sums[last] - sums[first]
    return (2 * count * share + whole) // (2 * whole) if whole else 0


@dataclass(frozen=True)
class Data:
    """All that training and evaluation need to know about the data."""

    train: Mixture
    validation: dict[str, TokenDataset]
    """By source name; a source without validation documents is not in it."""
    tokenizer: Tokenizer
    vocab_size: int
    eot_id: int
    fingerprint: str
    """sha256 of manifests, weights, seed and sample geometry: equal fingerprints give equal samples."""


def open_data(config: DataConfig) -> Data:
    """Open every source and check that they fit together. Raises UserError before any token is read."""
    train, validation, digest = {}, {}, hashlib.sha256()
    settings = {**config.model_dump(mode="json", exclude={"sources"}), "stride": config.stride or config.seq_len}
    if not config.weight_changes:
        del settings["weight_changes"]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    geometry: dict[str, Any] = {
        "seq_len": config.seq_len, "stride": config.stride, "shuffle_block": config.shuffle_block,
    }  # fmt: skip
    for number, (name, source) in enumerate(config.sources.items()):
        train[name] = TokenDataset(source.path / "train", seed=mix(config.seed, number), **geometry)
        if len(train[name]) == 0:
            tokens = train[name].num_tokens
            raise UserError(f"{source.path / 'train'}: {tokens} tokens, one sample needs seq_len + 1 = {config.seq_len + 1}")
        digest.update(f"{name} {source.weight!r} {sha256_file(source.path / 'train' / 'manifest.json')}".encode())
        if (source.path / "validation").is_dir():
            dataset = TokenDataset(source.path / "validation", seed=config.seed, **geometry)
            if dataset.num_windows() > 0:
                validation[name] = dataset
    first = next(iter(train.values())).manifest
    for dataset in (*train.values(), *validation.values()):
        for field in ("tokenizer_sha256", "vocab_size", "eot_id"):
            if getattr(dataset.manifest, field) != getattr(first, field):
                where, other = dataset.directory, next(iter(train.values())).directory
                values = f"{field}={getattr(dataset.manifest, field)} but {getattr(first, field)} in {other}"
                raise UserError(f"{where}: {values}: all sources need the same tokenizer")
    tokenizer = open_tokenizer(next(iter(config.sources.values())).path / "tokenizer")
    if tokenizer.fingerprint != first.tokenizer_sha256:
        where = next(iter(config.sources.values())).path
        raise UserError(f"{where / 'tokenizer'}: sha256 {tokenizer.fingerprint} is not the shards' {first.tokenizer_sha256}")
    (_, weights), *changes = config.phases()
    mixture = Mixture(list(train.values()), weights, changes)
    return Data(mixture, validation, tokenizer, first.vocab_size, first.eot_id, digest.hexdigest())


@dataclass(frozen=True)
class Window:
    """Global sample indices [start, start + count) that training leaves out."""

    start: int
    count: int


@dataclass(frozen=True)
class TrainState:
    """All that a run needs besides weights and optimizer. `samples` is the next global sample index."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: tuple[Window, ...] = ()

    def advance(self, num_samples: int, num_tokens: int) -> "TrainState":
        """The state after a step that used `num_samples` samples (skipped ones not counted) and `num_tokens` targets."""
        last = sample_indices(self, num_samples)[-1]
        samples = sample_indices(replace(self, samples=last + 1), 1)[0]
        return replace(self, step=self.step + 1, samples=samples, tokens=self.tokens + num_tokens)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainState":
        """Raises TypeError or KeyError on anything but what `to_json` gave."""
        return cls(**{**value, "skipped": tuple(Window(**window) for window in value["skipped"])})


def sample_indices(state: TrainState, count: int) -> list[int]:
    """The next `count` global sample indices that are in no skipped window."""
    indices: list[int] = []
    position = state.samples
    for window in sorted(state.skipped, key=lambda window: window.start):
        if window.start >= position + count - len(indices):
            break
        indices += range(position, max(position, window.start))
        position = max(position, window.start + window.count)
    return [*indices, *range(position, position + count - len(indices))]


def recompute_fed_hash(dataset: Dataset, state: TrainState, global_batch_size: int) -> int:
    """What the fed_hash of all ranks together must be at `state`, from the shards."""
    total = 0
    for index in sample_indices(state, global_batch_size):
        sample = dataset.sample(index)
        total += sample_hash(index, sample.inputs, sample.targets)
    return total & HASH_MASK


def sample_hash(index: int, ids: np.ndarray, targets: np.ndarray) -> int:
    """xxh3-64 of the global sample index and the inputs and targets (int64): one sample's term of the ledger."""
    digest = xxhash.xxh3_64(index.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(ids, "<i8").data)
    digest.update(np.ascontiguousarray(targets, "<i8").data)
    return digest.intdigest()
