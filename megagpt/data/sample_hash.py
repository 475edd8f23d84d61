"""The hash of the samples that a step feeds, computed again from the shards."""

import numpy as np
import xxhash

from megagpt.data.dataset import Dataset
from megagpt.data.mixture import Mixture
from megagpt.data.state import TrainState, sample_indices

HASH_MASK = (1 << 63) - 1
"""The ledger's sums are taken modulo 2^63, so that they fit int64 everywhere."""


def recompute_fed_hash(dataset: Dataset, state: TrainState, global_batch_size: int) -> int:
    """What the fed_hash of all ranks together must be at `state`, from the shards."""
    if isinstance(dataset, Mixture):
        dataset = dataset.continued(state.mixture)
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
