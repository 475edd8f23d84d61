"""Shards: Megatron's bytes, what was written is what is read, damage is named."""

import hashlib
import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.data.shards import (
    BLOCK_BYTES,
    Manifest,
    ShardError,
    ShardInfo,
    ShardWriter,
    document_offsets,
    open_shard,
    read_index_header,
    read_manifest,
    token_dtype,
    verify_shard,
    write_manifest,
)
from megagpt.files import read_json, write_json


def write_shard(directory: Path, documents: list[list[int]], dtype: str = "uint16", name: str = "shard_00000") -> ShardInfo:
    with ShardWriter(directory, name, np.dtype(dtype)) as writer:
        for number, tokens in enumerate(documents):
            writer.add(np.array(tokens, np.uint32), id=f"d:{number}", url=None, source="s", text_bytes=3 * len(tokens))
        return writer.close()


def write_split(directory: Path, documents: list[list[int]]) -> Manifest:
    manifest = Manifest("train", "uint16", 300, 0, "t", "c", (write_shard(directory, documents),))
    write_manifest(directory, manifest)
    return manifest


@pytest.mark.parametrize(
    ("dtype", "data", "index_sha256"),
    [
        ("uint16", "01000200030004000500", "196491994f9b9e16"),
        ("int32", "0100000002000000030000000400000005000000", "286f1fd8e3b4da9e"),
    ],
)
def test_golden_files_of_megatron(tmp_path: Path, dtype: str, data: str, index_sha256: str) -> None:
    # Written and read back with Megatron's own code: documents [1, 2, 3], [4, 5], [].
    write_shard(tmp_path, [[1, 2, 3], [4, 5], []], dtype)
    assert (tmp_path / "shard_00000.bin").read_bytes().hex() == data
    index = (tmp_path / "shard_00000.idx").read_bytes()
    assert len(index) == 90
    assert hashlib.sha256(index).hexdigest().startswith(index_sha256)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (65_499, "uint16"), (65_500, "int32"), (200_000, "int32")])
def test_dtype_is_megatrons_choice(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65_535), max_size=40), max_size=30))
def test_read_back_equals_written(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    directory = tmp_path_factory.mktemp("shard")
    info = write_shard(directory, documents)
    shard = open_shard(directory, info, "uint16")
    offsets = shard.document_offsets()
    assert [shard.read(int(a), int(b - a)).tolist() for a, b in itertools.pairwise(offsets)] == documents
    assert list(verify_shard(directory, info, "uint16")) == []
    assert sorted(path.name for path in directory.iterdir()) == [
        "shard_00000.bin",
        "shard_00000.docs.parquet",
        "shard_00000.idx",
    ]


def test_rows_and_block_hashes(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    tokens = np.random.default_rng(0).integers(0, 60_000, 3_000_000).astype(np.uint32)
    with ShardWriter(tmp_path, "shard_00000", np.dtype("uint16")) as writer:
        for start, end in ((0, 1_000_000), (1_000_000, 1_000_001), (1_000_001, 3_000_000)):
            writer.add(tokens[start:end], id=f"f:{start}", url=f"http://{start}", source="web", text_bytes=start)
        info = writer.close()
    data = (tmp_path / "shard_00000.bin").read_bytes()
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
    assert info.blocks_xxh3 == "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)
    assert info.text_bytes == 2_000_001
    rows = pq.read_table(tmp_path / "shard_00000.docs.parquet").to_pydict()
    assert rows == {
        "id": ["f:0", "f:1000000", "f:1000001"],
        "url": ["http://0", "http://1000000", "http://1000001"],
        "source": ["web"] * 3,
        "tokens": [1_000_000, 1, 1_999_999],
        "bytes": [0, 1_000_000, 1_000_001],
    }


def test_a_flipped_byte_is_named_at_its_first_read(tmp_path: Path) -> None:
    info = write_shard(tmp_path, [list(range(1000)) * 5000])
    with (tmp_path / "shard_00000.bin").open("r+b") as file:
        file.seek(BLOCK_BYTES + 17)
        byte = file.read(1)[0]
        file.seek(BLOCK_BYTES + 17)
        file.write(bytes([byte ^ 1]))
    shard = open_shard(tmp_path, info, "uint16")
    assert shard.read(0, 4).tolist() == [0, 1, 2, 3]
    last_sound = BLOCK_BYTES // 2 - 1
    assert shard.read(last_sound, 1).tolist() == [last_sound % 1000]
    for _ in range(2):
        with pytest.raises(
            ShardError, match=r"shard_00000\.bin: block 1 \(bytes 4194304 to 8388608\) has xxh3 .* the manifest"
        ):
            shard.read(last_sound, 2)
    assert [message.partition(" has ")[0].split(": ")[1] for message in verify_shard(tmp_path, info, "uint16")] == [
        "block 1 (bytes 4194304 to 8388608)"
    ]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.parquet"])
def test_truncated_and_missing_files_are_named_when_a_split_is_opened(tmp_path: Path, suffix: str) -> None:
    write_split(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / f"shard_00000{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match=rf"shard_00000\{suffix}: {len(data) - 1} bytes, the manifest says {len(data)}"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match=rf"shard_00000\{suffix}: No such file"):
        read_manifest(tmp_path)


def test_a_changed_index_is_named_when_the_shard_is_opened(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / "shard_00000.idx"
    data = bytearray(path.read_bytes())
    data[36] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard_00000\.idx: sha256 differs"):
        open_shard(tmp_path, manifest.shards[0], "uint16")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"TNTIDX\x00\x00" + bytes(40), "magic TNTIDX, the old fairseq"),
        (b"PK\x03\x04" + bytes(40), "not a Megatron index"),
        (b"MMIDIDX\x00\x00" + bytes(8), "17 bytes, the header alone has 34"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 0, 1), "index version 2"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 9, 0, 1), "dtype code 9"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 0), "0 document ends"),
    ],
)
def test_foreign_and_damaged_headers(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "x.idx").write_bytes(header)
    with pytest.raises(ShardError, match=rf"x\.idx: .*{message}"):
        read_index_header(tmp_path / "x.idx")


def test_damaged_document_ends(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 2, 0, 6, 0, 5, 2)
    )
    with pytest.raises(ShardError, match="document ends are not ascending"):
        document_offsets(tmp_path / "x.idx", np.dtype("uint16"))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 90), st.binary(max_size=12), st.sampled_from(["put in", "put over", "cut off"]))
@example(82, bytes.fromhex("83e8c47f2de06a1e990ff1d0"), "put over")  # ends so far apart that their difference overflows
def test_fuzzed_index(tmp_path_factory: pytest.TempPathFactory, position: int, noise: bytes, kind: str) -> None:
    """Noise anywhere in an index: it is refused by its file's name, or its documents lie in order."""
    path = tmp_path_factory.getbasetemp() / "fuzz.idx"
    lengths, starts, ends = (3, 2, 4), (0, 6, 10), (0, 1, 1, 3)
    data = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", *lengths, *starts, *ends)
    rest = {"put in": data[position:], "put over": data[position + len(noise) :], "cut off": b""}[kind]
    path.write_bytes(data[:position] + noise + rest)
    try:
        offsets = document_offsets(path, np.dtype("uint16"))
    except ShardError:
        return
    assert offsets[0] == 0
    assert np.all(np.diff(offsets) >= 0)


def test_manifest_reads_back_and_refuses_what_is_none(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, [[1, 2, 3], [4]])
    assert read_manifest(tmp_path) == manifest
    assert (manifest.tokens, manifest.documents, manifest.text_bytes) == (4, 2, 12)
    values = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {**values, "format": 9})
    with pytest.raises(ShardError, match=r"manifest\.json: format=9, this version reads formats 1 to 3"):
        read_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {**values, "surprise": 1})
    with pytest.raises(ShardError, match="not a shard manifest"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, replace(manifest, shards=(replace(manifest.shards[0], tokens=3),)))
    with pytest.raises(ShardError, match="tokens, bin_bytes and blocks_xxh3 do not agree"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


def test_ids_that_do_not_fit_and_reads_outside(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", np.dtype("uint16")) as writer, pytest.raises(ShardError, match="65536 does not fit uint16"):
        writer.add(np.array([1, 65_536], np.uint32), id="a")
    assert list(tmp_path.iterdir()) == []
    shard = open_shard(tmp_path, write_shard(tmp_path, [[1, 2]]), "uint16")
    with pytest.raises(ShardError, match="tokens 1 to 3 asked of a shard with 2"):
        shard.read(1, 2)


def test_a_million_documents_stay_out_of_memory(tmp_path: Path) -> None:
    # Lengths go through a file: the index of many documents is right across its chunks of 1 MiB.
    tokens = np.arange(3_000_000, dtype=np.uint32) % 60_000
    lengths = np.tile([2, 0, 1, 4, 3], 300_000)
    with ShardWriter(tmp_path, "s", np.dtype("uint16")) as writer:
        for start in range(0, 1_500_000, 50_000):
            part = lengths[start : start + 50_000]
            rows = {"id": [""] * 50_000, "url": [None] * 50_000, "source": [""] * 50_000, "bytes": [0] * 50_000}
            writer.add_many(tokens[2 * start : 2 * (start + 50_000)], part, rows)
        info = writer.close()
    offsets = document_offsets(tmp_path / "s.idx", np.dtype("uint16"))
    assert np.array_equal(offsets, np.concatenate([[0], np.cumsum(lengths)]))
    assert (info.documents, info.tokens) == (1_500_000, 3_000_000)
    sequences = int((lengths > 0).sum())
    pointers = np.fromfile(tmp_path / "s.idx", "<i8", sequences, offset=34 + 4 * sequences)
    filled = lengths[lengths > 0]
    assert np.array_equal(pointers, 2 * np.concatenate([[0], np.cumsum(filled)[:-1]]))
