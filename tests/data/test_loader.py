"""The loader: a computed order, the same samples for every layout, exact mixtures, a ledger that adds up, validation."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import UserError, validate
from megagpt.data.dataset import TokenDataset
from megagpt.data.loader import Loader, StepBatches, eval_batches, step_batches
from megagpt.data.mixture import Mixture
from megagpt.data.open_data import Data, DataConfig, open_data
from megagpt.data.permutation import mix, permute, unpermute
from megagpt.data.sample_hash import recompute_fed_hash
from megagpt.data.shards import BLOCK_BYTES, Manifest, ShardError, ShardWriter, read_manifest, write_manifest
from megagpt.data.state import TrainState, Window, sample_indices
from megagpt.documents import IGNORE
from megagpt.tokenizer.base import token_lengths
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.train.preflight import packing_warning

EOT = 256


def write_split(directory: Path, *, documents: int = 60, shards: int = 3, seed: int = 0) -> np.ndarray:
    """A split of random bytes; returns all its tokens."""
    rng, infos, everything = np.random.default_rng(seed), [], []
    for number in range(shards):
        with ShardWriter(directory, f"shard_{number:05d}", np.dtype("uint16")) as writer:
            for i in range(documents // shards):
                tokens = np.append(rng.integers(0, 256, rng.integers(1, 90)), EOT).astype(np.uint32)
                writer.add(tokens, id=f"{number}:{i}", source="s", text_bytes=len(tokens) - 1)
                everything.append(tokens)
            infos.append(writer.close())
    fingerprint = open_tokenizer("bytes").fingerprint
    write_manifest(directory, Manifest(directory.name, "uint16", 257, EOT, fingerprint, "", tuple(infos)))
    return np.concatenate(everything).astype(np.int64)


def write_source(root: Path, seed: int = 0) -> Path:
    write_split(root / "train", seed=seed)
    write_split(root / "validation", documents=9, seed=seed + 100)
    open_tokenizer("bytes").save(root / "tokenizer")
    return root


def configure(sources: dict[str, tuple[Path, float]], **values: object) -> DataConfig:
    section = {name: {"path": str(path), "weight": weight} for name, (path, weight) in sources.items()}
    return validate(DataConfig, {"sources": section, "seq_len": 16, **values}, source="test")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Data:
    other = write_source(tmp_path_factory.mktemp("other"), seed=7)
    return open_data(configure({"web": (source, 3.0), "wiki": (other, 1.0)}, shuffle_block=4))


# ---- the permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 64, 100, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_is_a_bijection_and_unpermute_its_inverse(size: int, key: int) -> None:
    image = [permute(i, size, key) for i in range(size)]
    assert sorted(image) == list(range(size))
    assert [unpermute(i, size, key) for i in image] == list(range(size))


def test_permutation_moves_everything_about_evenly() -> None:
    # 4,000 keys send each of 7 places to each other about 571 times (standard deviation 22).
    counts = Counter((i, permute(i, 7, mix(5, key))) for key in range(4000) for i in range(7))
    assert len(counts) == 49
    assert min(counts.values()) > 571 - 5 * 22
    assert max(counts.values()) < 571 + 5 * 22
    follows = Counter((permute(i + 1, 1000, 3) - permute(i, 1000, 3)) % 1000 for i in range(999))
    assert max(follows.values()) <= 8


def test_permutation_of_a_huge_range_and_its_errors() -> None:
    assert unpermute(permute(123_456_789_012, 10**13, 4), 10**13, 4) == 123_456_789_012
    with pytest.raises(ValueError, match=r"index=3 is outside 0\.\.2"):
        permute(3, 3, 0)


def slow_order(length: int, block: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch written out: list the blocks, put each where the permutation says, read them in turn."""
    blocks = [list(range(start, min(start + block, length))) for start in range(0, length, block)]
    key = mix(seed, epoch)
    return list(itertools.chain.from_iterable(blocks[permute(i, len(blocks), key)] for i in range(len(blocks))))


@pytest.mark.parametrize(("block", "stride"), [(1, 16), (4, 16), (7, 16), (64, 16), (1000, 16), (5, 3)])
def test_order_of_samples_is_the_slow_one(source: Path, block: int, stride: int) -> None:
    dataset = TokenDataset(source / "train", seq_len=16, seed=11, stride=stride, shuffle_block=block)
    length = len(dataset)
    assert length == (dataset.num_tokens - 17) // stride + 1
    for epoch in range(3):
        found = [dataset.first_token(epoch * length + i) // stride for i in range(length)]
        assert found == slow_order(length, block, 11, epoch)
        assert sorted(found) == list(range(length))


# ---- samples


def test_samples_are_windows_over_all_shards(tmp_path: Path) -> None:
    tokens = write_split(tmp_path)
    dataset = TokenDataset(tmp_path, seq_len=33, seed=1, stride=20, shuffle_block=3)
    assert dataset.num_tokens == len(tokens)
    for index in range(2 * len(dataset)):
        start, sample = dataset.first_token(index), dataset.sample(index)
        assert sample.inputs.tolist() == tokens[start : start + 33].tolist()
        assert sample.targets.tolist() == tokens[start + 1 : start + 34].tolist()
        pieces = np.split(sample.inputs, np.cumsum(sample.doc_lengths)[:-1])
        assert all(piece[-1] == EOT for piece in pieces[:-1])
        assert not any(EOT in piece[:-1] for piece in pieces)
        assert all(len(piece) for piece in pieces)
        assert sample.doc_lengths.sum() == 33


@pytest.mark.parametrize(
    ("packed", "stride", "warns"), [(None, None, False), (32, None, False), (32, 16, True), (64, None, True)]
)
def test_shards_that_were_packed_for_other_samples_are_named(
    tmp_path: Path, packed: int | None, stride: int | None, warns: bool
) -> None:
    write_split(tmp_path)
    write_manifest(tmp_path, replace(read_manifest(tmp_path), pack_seq_len=packed))
    warning = packing_warning(TokenDataset(tmp_path, seq_len=32, stride=stride))
    assert (warning is not None) == warns
    assert warning is None or f"samples of {packed} tokens" in warning


def test_windows_cover_each_target_once_in_order(tmp_path: Path) -> None:
    tokens = write_split(tmp_path)
    dataset = TokenDataset(tmp_path, seq_len=50)
    targets = np.concatenate([dataset.window(i).targets for i in range(dataset.num_windows())])
    assert targets[targets != IGNORE].tolist() == tokens[1:].tolist()
    assert np.all(targets[len(tokens) - 1 :] == IGNORE)


def test_documents_of_tokens(tmp_path: Path) -> None:
    tokens = write_split(tmp_path)
    dataset = TokenDataset(tmp_path, seq_len=50)
    ends = np.flatnonzero(tokens == EOT)
    for token in (0, 1, int(ends[0]), int(ends[0]) + 1, int(ends[19]) + 1, int(ends[33]), len(tokens) - 1):
        number = int(np.searchsorted(ends, token))
        path, row, start = dataset.document(token)
        assert (path.name, row) == (f"shard_{number // 20:05d}.docs.parquet", number % 20)
        assert start == (ends[number - 1] + 1 if number else 0)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.25, 1 / 3, 1.0, 2.0, 7.5]), min_size=1, max_size=6))
def test_mixture_proportions_are_exact(weights: list[float]) -> None:
    datasets = [Counting(10 + i) for i in range(len(weights))]
    mixture = Mixture(datasets, weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    taken = [0] * len(weights)
    for index in range(400):
        source, position = mixture.locate(index)
        assert position == taken[source]
        taken[source] += 1
        for k, weight in enumerate(weights):
            assert abs(taken[k] - (index + 1) * Fraction(str(weight)) / total) <= math.ceil(math.log2(len(weights))) / 2
    length = len(mixture)
    seen = Counter(mixture.locate(i)[0] for i in range(length + 2 * len(weights)))
    assert all(seen[k] >= len(dataset) for k, dataset in enumerate(datasets))


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True).map(sorted),
    weights=st.lists(st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 2.0]), min_size=3, max_size=3).filter(any), min_size=4),
)
def test_mixture_whose_weights_change(starts: list[int], weights: list[list[float]]) -> None:
    datasets, first = [Counting(10 + i) for i in range(3)], [1.0, 2.0, 0.5]
    changes = list(zip(starts, weights, strict=False))
    mixture = Mixture(datasets, first, changes)
    taken = [0, 0, 0]
    phases = [(0, first), *changes]
    for number, (start, values) in enumerate(phases):
        end = phases[number + 1][0] if number + 1 < len(phases) else start + 40
        before = list(taken)
        for index in range(start, end):
            source, position = mixture.locate(index)
            assert position == taken[source]  # nothing again, nothing left out
            taken[source] += 1
            for k, weight in enumerate(values):
                share = (index + 1 - start) * Fraction(str(weight)) / sum(Fraction(str(value)) for value in values)
                assert abs(taken[k] - before[k] - share) <= 1
                assert weight or taken[k] == before[k]
    for index in range(starts[0]):
        assert mixture.locate(index) == Mixture(datasets, first).locate(index)


def test_weights_change_in_training_as_configured(source: Path, two_sources: Data, tmp_path: Path) -> None:
    sources = {"web": (source, 3.0), "wiki": (write_source(tmp_path / "wiki", seed=7), 1.0)}
    change = {"from_sample": 8, "weights": {"web": 0}}
    changed = open_data(configure(sources, shuffle_block=4, weight_changes=[change]))
    plain = open_data(configure(sources, shuffle_block=4))
    assert plain.fingerprint == two_sources.fingerprint
    assert changed.fingerprint != plain.fingerprint
    assert [changed.train.locate(i)[0] for i in range(8, 20)] == [1] * 12
    for state in (TrainState(), TrainState(step=1, samples=6)):  # the second step holds the change
        batches = [
            step_batches(changed.train, state, global_batch_size=6, micro_batch_size=2, rank=rank, size=2) for rank in range(2)
        ]
        total = sum(batch.fed_hash for batch in batches) & (2**63 - 1)
        assert total == recompute_fed_hash(changed.train, state, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"from_sample": 5, "weights": {"web": 1}}, {"from_sample": 5, "weights": {"web": 2}}], "must ascend"),
        ([{"from_sample": 5, "weights": {"news": 1}}], "'news' is not one of the sources"),
        ([{"from_sample": 5, "weights": {"web": 0}}], "from_sample=5: every source has weight 0"),
    ],
)
def test_impossible_weight_changes_are_refused(source: Path, changes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure({"web": (source, 1.0)}, weight_changes=changes)


class Counting:
    """A dataset that only has a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int):
        raise NotImplementedError


# ---- steps


def test_state_jumps_over_skipped_windows() -> None:
    state = TrainState(samples=5, skipped=(Window(14, 10), Window(10, 7)))
    assert sample_indices(state, 7) == [5, 6, 7, 8, 9, 24, 25]
    assert state.advance(5, 100) == replace(state, step=1, samples=24, tokens=100)
    assert state.advance(6, 100).samples == 25
    assert sample_indices(TrainState(samples=12, skipped=(Window(10, 7),)), 2) == [17, 18]
    assert sample_indices(TrainState(samples=30, skipped=(Window(10, 7),)), 2) == [30, 31]
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@settings(max_examples=100, deadline=None)
@given(
    windows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=5),
    start=st.integers(0, 60),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_steps_leave_out_exactly_the_skipped(windows: list[tuple[int, int]], start: int, counts: list[int]) -> None:
    skipped = {i for first, count in windows for i in range(first, first + count)}
    expected = [i for i in range(start, 400) if i not in skipped]
    state, found = TrainState(samples=start, skipped=tuple(Window(*window) for window in windows)), []
    for count in counts:
        found += sample_indices(state, count)
        state = state.advance(count, 0)
    assert found == expected[: sum(counts)]


def rows(batches: list[StepBatches]) -> dict[int, tuple[list[int], list[int]]]:
    """Global sample index -> inputs and targets, over all ranks; each index once."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for batch in (b for part in batches for b in part.micro_batches if b.num_targets):
        for row, (ids, targets) in enumerate(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True)):
            assert batch.first_sample + row not in found
            found[batch.first_sample + row] = (ids, targets)
    return found


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 12), (1, 5), (2, 3), (3, 4), (4, 1), (5, 5), (7, 2), (16, 1)])
def test_any_layout_feeds_the_same_samples(two_sources: Data, size: int, micro_batch_size: int) -> None:
    state = TrainState(step=3, samples=37)
    layout: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": micro_batch_size, "size": size}
    batches = [step_batches(two_sources.train, state, rank=rank, **layout) for rank in range(size)]
    expected = {i: two_sources.train.sample(i) for i in range(37, 49)}
    assert rows(batches) == {i: (s.inputs.tolist(), s.targets.tolist()) for i, s in expected.items()}
    assert len({len(part.micro_batches) for part in batches}) == 1
    ledger = sum(part.fed_hash for part in batches) % 2**63
    assert ledger == recompute_fed_hash(two_sources.train, state, 12)
    assert sum(part.num_targets for part in batches) == 12 * 16
    for part in batches:
        for batch in part.micro_batches:
            assert batch.ids.dtype == batch.targets.dtype == torch.int64
            assert batch.num_targets == int((batch.targets != IGNORE).sum())
            assert batch.doc_lengths is None
            assert batch.num_targets or batch.ids.shape == (1, 16)


def test_micro_batches_are_dealt_in_turn(two_sources: Data) -> None:
    layout: dict[str, Any] = {"global_batch_size": 11, "micro_batch_size": 3, "size": 3}
    parts = [step_batches(two_sources.train, TrainState(), rank=rank, **layout) for rank in range(3)]
    firsts = [[(batch.first_sample, len(batch.ids), batch.num_targets) for batch in part.micro_batches] for part in parts]
    assert firsts == [[(0, 3, 48), (9, 2, 32)], [(3, 3, 48), (0, 1, 0)], [(6, 3, 48), (0, 1, 0)]]


def test_rows_name_their_source_and_targets_are_counted_by_it(two_sources: Data) -> None:
    mixture = two_sources.train
    layout: dict[str, Any] = {"global_batch_size": 11, "micro_batch_size": 3, "size": 3}
    parts = [step_batches(mixture, TrainState(samples=5), rank=rank, **layout) for rank in range(3)]
    counted = [0, 0]
    for batch in (batch for part in parts for batch in part.micro_batches):
        assert batch.sources is not None
        sources = batch.sources.tolist()
        assert sources == [mixture.locate(batch.first_sample + row)[0] for row in range(len(batch.ids))]
        for source, targets in zip(sources, batch.targets.tolist(), strict=True):
            counted[source] += sum(target != IGNORE for target in targets)
    assert [sum(counts) for counts in zip(*(part.targets_by_source for part in parts), strict=True)] == counted
    assert min(counted) > 0
    alone = step_batches(Mixture(mixture.datasets[:1], [1.0]), TrainState(), rank=0, **layout)
    assert alone.targets_by_source == ()
    assert alone.micro_batches[0].sources is None


class Swapped:
    """A dataset with two of its samples exchanged."""

    def __init__(self, dataset: Mixture, first: int, second: int) -> None:
        self.dataset, self.other = dataset, {first: second, second: first}

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int):
        return self.dataset.sample(self.other.get(index, index))


def test_the_ledger_notices_other_samples_and_another_order(two_sources: Data) -> None:
    hashes = {recompute_fed_hash(two_sources.train, TrainState(samples=n), 12) for n in range(20)}
    assert len(hashes) == 20
    assert all(0 <= value < 2**63 for value in hashes)
    assert recompute_fed_hash(Swapped(two_sources.train, 2, 5), TrainState(), 12) not in hashes


def test_document_lengths_reach_the_batch(two_sources: Data) -> None:
    layout: dict[str, Any] = {"global_batch_size": 6, "micro_batch_size": 6, "rank": 0, "size": 1, "document_mask": True}
    (batch,) = step_batches(two_sources.train, TrainState(), **layout).micro_batches
    assert batch.doc_lengths is not None
    for index, lengths in enumerate(batch.doc_lengths.tolist()):
        assert [n for n in lengths if n] == two_sources.train.sample(index).doc_lengths.tolist()
        assert sum(lengths) == 16


def test_loader_gives_the_steps_of_any_state(two_sources: Data) -> None:
    layout: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 1, "size": 2}
    loader = Loader(two_sources.train, **layout)
    state = TrainState()
    states = [state := state.advance(8, 128) for _ in range(4)]
    rewound = replace(states[1], skipped=(Window(16, 8),))
    for state in [TrainState(), *states, rewound, states[0]]:
        found, expected = loader.step(state), step_batches(two_sources.train, state, **layout)
        assert rows([found]) == rows([expected])
        assert found.fed_hash == expected.fed_hash
    loader.close()


def test_errors_of_the_thread_come_out_of_step(tmp_path: Path) -> None:
    write_split(tmp_path)
    path = tmp_path / "shard_00001.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 255
    path.write_bytes(data)
    dataset = TokenDataset(tmp_path, seq_len=16, shuffle_block=10_000)
    loader = Loader(dataset, global_batch_size=16, micro_batch_size=16, rank=0, size=1)
    state = TrainState()
    with pytest.raises(ShardError, match=r"shard_00001\.bin: block 0"):  # noqa: PT012 (which step meets the block is the data's)
        for _ in range(len(dataset)):
            loader.step(state)
            state = state.advance(16, 0)
    assert state.step > 2
    loader.close()


# ---- validation and opening


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 4), (3, 2), (8, 5)])
def test_validation_covers_the_split_and_its_bytes(source: Path, size: int, micro_batch_size: int) -> None:
    dataset = TokenDataset(source / "validation", seq_len=16)
    lengths = token_lengths(open_tokenizer("bytes"))
    parts = [
        list(eval_batches(dataset, micro_batch_size=micro_batch_size, rank=rank, size=size, token_lengths=lengths))
        for rank in range(size)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert sum(batch.num_targets for batch in batches) == dataset.num_tokens - 1
    # The first token of the split is nobody's target; here it is one byte.
    assert sum(batch.num_bytes for batch in batches) == dataset.manifest.text_bytes - 1
    few = list(eval_batches(dataset, micro_batch_size=4, max_samples=6))
    assert [len(batch.ids) for batch in few] == [4, 2]
    assert few[0].ids[1].tolist() == dataset.window(1).inputs.tolist()


def test_a_validation_split_shorter_than_a_sample_is_empty_on_the_other_ranks(source: Path) -> None:
    dataset = TokenDataset(source / "validation", seq_len=100_000)
    targets = [[batch.num_targets for batch in eval_batches(dataset, micro_batch_size=2, rank=rank, size=2)] for rank in (0, 1)]
    assert targets == [[dataset.num_tokens - 1], [0]]


def test_open_data_checks_that_sources_fit(source: Path, tmp_path: Path) -> None:
    data = open_data(configure({"a": (source, 1.0)}))
    assert (data.vocab_size, data.eot_id, list(data.validation), data.tokenizer.kind) == (257, EOT, ["a"], "bytes")
    same = open_data(configure({"a": (source, 1.0)}, stride=16))
    assert same.fingerprint == data.fingerprint
    for changed in ({"seed": 1}, {"stride": 8}, {"shuffle_block": 1}, {"document_mask": True}, {"seq_len": 17}):
        assert open_data(configure({"a": (source, 1.0)}, **changed)).fingerprint != data.fingerprint
    assert open_data(configure({"a": (source, 2.0)})).fingerprint != data.fingerprint
    with pytest.raises(UserError, match=r"train: \d+ tokens, one sample needs seq_len \+ 1 = 100001"):
        open_data(configure({"a": (source, 1.0)}, seq_len=100_000))
    with pytest.raises(UserError, match=r"no manifest\.json here"):
        open_data(configure({"a": (tmp_path / "absent", 1.0)}))
    other = write_source(tmp_path / "other")
    manifest = json.loads((other / "train" / "manifest.json").read_text())
    (other / "train" / "manifest.json").write_text(json.dumps({**manifest, "eot_id": 3}))
    with pytest.raises(UserError, match=r"other/train: eot_id=3 but 256 in .*: all sources need the same tokenizer"):
        open_data(configure({"a": (source, 1.0), "b": (other, 1.0)}))
    foreign = write_source(tmp_path / "foreign")
    for split in ("train", "validation"):
        manifest = json.loads((foreign / split / "manifest.json").read_text())
        (foreign / split / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "ab" * 32}))
    with pytest.raises(UserError, match=r"tokenizer: sha256 .* is not the shards' abab"):
        open_data(configure({"a": (foreign, 1.0)}))
    with pytest.raises(UserError, match=r"sources\.a\.weight=0: input should be greater than 0"):
        configure({"a": (source, 0)})


def test_sources_have_orders_of_their_own(source: Path) -> None:
    data = open_data(configure({"a": (source, 1.0), "b": (source, 1.0)}, shuffle_block=1))
    first, second = data.train.datasets
    assert isinstance(first, TokenDataset)
    assert isinstance(second, TokenDataset)
    assert [first.first_token(i) for i in range(20)] != [second.first_token(i) for i in range(20)]


SHARD_TOKENS = 100_000_000


def test_start_reads_no_shard_and_needs_no_memory(tmp_path: Path) -> None:
    # 20 sparse shards of 10^8 tokens: reading them, or an index of their samples, would take hundreds of megabytes.
    infos = []
    for number in range(20):
        with ShardWriter(tmp_path, f"s{number:02d}", np.dtype("uint16")) as writer:
            writer.add(np.array([1, 2, 0], np.uint32), id="a")
            info = writer.close()
        os.truncate(tmp_path / f"s{number:02d}.bin", 2 * SHARD_TOKENS)
        hashes = "0" * 16 * -(-2 * SHARD_TOKENS // BLOCK_BYTES)
        infos.append(replace(info, tokens=SHARD_TOKENS, bin_bytes=2 * SHARD_TOKENS, blocks_xxh3=hashes))
    write_manifest(tmp_path, Manifest("train", "uint16", 257, 0, "t", "c", tuple(infos)))
    program = f"""
from pathlib import Path
from megagpt.data.dataset import TokenDataset
def peak():  # in KiB; getrusage would count the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
dataset = TokenDataset(Path({str(tmp_path)!r}), seq_len=2048, seed=3)
firsts = [dataset.first_token(i) for i in range(1000)]
print(len(dataset), len(set(firsts)), (peak() - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=900)
    length, different, megabytes = map(int, result.stdout.split())
    assert length == (20 * SHARD_TOKENS - 2049) // 2048 + 1
    assert different == 1000
    assert megabytes < 50


def test_short_micro_batches_are_filled_up_with_rows_without_targets(tmp_path: Path) -> None:
    """Targets, hashes, sources and documents of the samples stay; only rows without targets come behind them."""
    sources = {"a": (write_source(tmp_path / "a"), 0.5), "b": (write_source(tmp_path / "b", seed=1), 0.5)}
    data = open_data(configure(sources))
    layout: dict[str, Any] = {"global_batch_size": 10, "micro_batch_size": 4, "size": 4, "document_mask": True}
    for rank in range(4):
        plain, full = (
            step_batches(data.train, TrainState(), rank=rank, full_rows=full_rows, **layout) for full_rows in (False, True)
        )
        assert (full.num_targets, full.fed_hash) == (plain.num_targets, plain.fed_hash)
        assert full.targets_by_source == plain.targets_by_source
        for before, after in zip(plain.micro_batches, full.micro_batches, strict=True):
            count = len(before.ids)
            assert count == (4, 4, 2, 1)[rank]
            assert torch.equal(after.ids[:count], before.ids)
            assert torch.equal(after.targets[:count], before.targets)
            assert bool((after.targets[count:] == IGNORE).all())
            assert after.doc_lengths is not None
            assert after.sources is not None
            assert after.doc_lengths.sum(1).tolist() == [after.ids.shape[1]] * 4
            assert [len(x) for x in (after.ids, after.targets, after.sources)] == [4, 4, 4]
    for dataset in data.validation.values():
        plain_eval = list(eval_batches(dataset, micro_batch_size=4, document_mask=True))
        full_eval = list(eval_batches(dataset, micro_batch_size=4, document_mask=True, full_rows=True))
        assert sum(batch.num_targets for batch in full_eval) == sum(batch.num_targets for batch in plain_eval)
        assert {len(batch.ids) for batch in full_eval} == {4}
        assert len(plain_eval[-1].ids) < 4
