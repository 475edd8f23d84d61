"""From samples to micro-batches: one rank's part of a step, validation in order, and a loader that prepares the next step.

`step_batches` takes a TrainState, whose `samples` is the next global sample index, and gives one rank its micro-batches of that
step. The samples of a step are the same for any number of ranks and any micro-batch size; a rewind is only another TrainState.
The ledger: each rank hashes what it feeds, the sum over ranks must equal `recompute_fed_hash`, which reads the shards again.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from megagpt.data.dataset import Dataset, Sample, TokenDataset
from megagpt.data.mixture import Mixture
from megagpt.data.sample_hash import HASH_MASK, sample_hash
from megagpt.data.state import MixtureStart, TrainState, Window, sample_indices
from megagpt.documents import IGNORE


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass of one rank. `num_targets` 0 = an empty one that keeps the ranks in step."""

    ids: torch.Tensor
    """[B, T] int64."""
    targets: torch.Tensor
    """[B, T] int64, IGNORE where there is no loss."""
    doc_lengths: torch.Tensor | None
    """[B, D] int64, padded with zeros; None when attention may cross documents."""
    first_sample: int
    """Global sample index of row 0, the seed of this micro-batch's dropout."""
    num_targets: int
    sources: torch.Tensor | None = None
    """[B] int64, which of a mixture's sources each row is from; None where there is one source."""
    num_bytes: int = 0
    """UTF-8 bytes of the text in the targets, for bits per byte; filled by `eval_batches` only."""


@dataclass(frozen=True)
class StepBatches:
    """One rank's part of a step."""

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    fed_hash: int
    """Sum modulo 2^63 of this rank's sample hashes. Sums over ranks are taken in int64 and masked with 2^63 - 1 (wrapping is
    harmless), and are then the same on every layout."""
    targets_by_source: tuple[int, ...] = ()
    """`num_targets` by source of a mixture; () where there is one source."""


def step_batches(
    dataset: Dataset,
    state: TrainState,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    document_mask: bool = False,
    full_rows: bool = False,
) -> StepBatches:
    """One rank's micro-batches of the step at `state`; with `full_rows` all have `micro_batch_size` rows (see `filled_up`).

    The step's samples form micro-batches 0, 1, … of `micro_batch_size` consecutive samples, the last maybe smaller; number j
    goes to rank j % size. All ranks have equally many: a short rank gets an empty one (one row, all targets IGNORE).
    """
    mixture = dataset.continued(state.mixture) if isinstance(dataset, Mixture) else None
    dataset = mixture or dataset
    targets_by_source = [0] * (len(mixture.datasets) if mixture is not None and len(mixture.datasets) > 1 else 0)
    indices = sample_indices(state, global_batch_size)
    groups = [indices[i : i + micro_batch_size] for i in range(0, len(indices), micro_batch_size)]
    micro_batches, fed_hash = [], 0
    for number in range(rank, -(-len(groups) // size) * size, size):
        group = groups[number] if number < len(groups) else []
        samples = [dataset.sample(index) for index in group]
        if samples:
            batch = _collate(samples, group[0], document_mask)
        else:
            batch = _empty(len(dataset.sample(indices[0]).inputs), indices[0], document_mask)
        for index, ids, targets in zip(group, batch.ids.numpy(), batch.targets.numpy(), strict=False):
            fed_hash += sample_hash(index, ids, targets)
        if mixture is not None and targets_by_source:
            sources = [mixture.locate(index)[0] for index in group or indices[:1]]
            for source, targets in zip(sources, batch.targets, strict=True):
                targets_by_source[source] += int((targets != IGNORE).sum())
            batch = replace(batch, sources=torch.tensor(sources))
        micro_batches.append(filled_up(batch, micro_batch_size) if full_rows else batch)
    num_targets = sum(batch.num_targets for batch in micro_batches)
    return StepBatches(tuple(micro_batches), num_targets, fed_hash & HASH_MASK, tuple(targets_by_source))


def eval_batches(
    dataset: TokenDataset,
    *,
    micro_batch_size: int,
    rank: int = 0,
    size: int = 1,
    max_samples: int | None = None,
    document_mask: bool = False,
    token_lengths: np.ndarray | None = None,
    full_rows: bool = False,
) -> Iterator[MicroBatch]:
    """Windows of a split in order, without overlap, dealt to ranks as `step_batches` does; each token but the first is a target
    once. With `token_lengths` (tokenizer.token_lengths) num_bytes is exactly the text that the targets stand for; classes
    stand for none. `full_rows` as of `step_batches`.
    """
    rows = micro_batch_size if full_rows else 1
    windows = dataset.num_windows() if max_samples is None else min(max_samples, dataset.num_windows())
    groups = [range(i, min(i + micro_batch_size, windows)) for i in range(0, windows, micro_batch_size)]
    for number in range(rank, -(-len(groups) // size) * size, size):
        samples = [dataset.window(index) for index in groups[number]] if number < len(groups) else []
        if not samples:
            yield filled_up(_empty(dataset.seq_len, 0, document_mask), rows)
            continue
        batch = _collate(samples, groups[number][0], document_mask)
        if token_lengths is not None and not dataset.manifest.classes:
            targets = batch.targets.numpy()
            batch = replace(batch, num_bytes=int(token_lengths[targets[targets != IGNORE]].sum()))
        yield filled_up(batch, rows)


def filled_up(batch: MicroBatch, rows: int) -> MicroBatch:
    """`batch` with rows without targets up to `rows`: one shape for all, of which torch.compile makes one graph."""
    missing = rows - len(batch.ids)
    if missing <= 0:
        return batch
    row = torch.zeros(missing, batch.ids.shape[1], dtype=batch.ids.dtype)
    doc_lengths, sources = batch.doc_lengths, batch.sources
    if doc_lengths is not None:
        whole = doc_lengths.new_zeros(missing, doc_lengths.shape[1])
        whole[:, 0] = batch.ids.shape[1]
        doc_lengths = torch.cat([doc_lengths, whole])
    if sources is not None:
        sources = torch.cat([sources, sources[:1].expand(missing)])
    ids, targets = torch.cat([batch.ids, row]), torch.cat([batch.targets, torch.full_like(row, IGNORE)])
    return replace(batch, ids=ids, targets=targets, doc_lengths=doc_lengths, sources=sources)


_Place: TypeAlias = tuple[int, int, tuple[Window, ...], MixtureStart | None]
"""The fields of a TrainState that fix the next samples: step, samples, skipped, mixture."""


class Loader:
    """`step_batches` with the next step made ready by one background thread. Its errors surface in `step`."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int | Callable[[int], int],
        micro_batch_size: int,
        rank: int,
        size: int,
        document_mask: bool = False,
        full_rows: bool = False,
    ) -> None:
        """`global_batch_size`: samples per step, or a function that gives them for a step's number."""
        self._dataset = dataset
        self._batch_size_at = global_batch_size if callable(global_batch_size) else lambda step: global_batch_size
        self._layout: dict[str, Any] = {
            "micro_batch_size": micro_batch_size, "rank": rank, "size": size, "document_mask": document_mask,
            "full_rows": full_rows,
        }  # fmt: skip
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ready: tuple[_Place, Future[StepBatches]] | None = None

    def step(self, state: TrainState) -> StepBatches:
        """This rank's part of the step at `state`, any state: what was made ready for another one is dropped."""
        if self._ready is None or self._ready[0] != (state.step, state.samples, state.skipped, state.mixture):
            self._ready = self._start(state)
        batches = self._ready[1].result()
        self._ready = self._start(state.advance(self._batch_size_at(state.step), 0))
        return batches

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, state: TrainState) -> tuple[_Place, "Future[StepBatches]"]:
        size = self._batch_size_at(state.step)
        future = self._thread.submit(step_batches, self._dataset, state, global_batch_size=size, **self._layout)
        return (state.step, state.samples, state.skipped, state.mixture), future


def _collate(samples: Sequence[Sample], first_sample: int, document_mask: bool) -> MicroBatch:
    ids = torch.from_numpy(np.stack([sample.inputs for sample in samples]))
    targets = torch.from_numpy(np.stack([sample.targets for sample in samples]))
    doc_lengths = None
    if document_mask:
        width = max(len(sample.doc_lengths) for sample in samples)
        doc_lengths = torch.zeros(len(samples), width, dtype=torch.int64)
        for row, sample in enumerate(samples):
            doc_lengths[row, : len(sample.doc_lengths)] = torch.from_numpy(sample.doc_lengths.astype(np.int64))
    return MicroBatch(ids, targets, doc_lengths, first_sample, int((targets != IGNORE).sum()))


def _empty(length: int, first_sample: int, document_mask: bool) -> MicroBatch:
    nothing = Sample(np.zeros(length, np.int64), np.full(length, IGNORE), np.array([length], np.int32))
    return _collate([nothing], first_sample, document_mask)
