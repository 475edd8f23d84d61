"""Bad cells, columns, numbers and characters cost their row or nothing; long windows and dictionaries of zstd are read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.config import UserError
from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.extract_documents import read_outcomes
from megagpt.corpus.readers.inputs import input_blocks
from megagpt.corpus.readers.records import datasets_outcomes
from megagpt.corpus.runner.blocks import Block, MalformedRecord, Outcome
from megagpt.documents import Document, format_document, parse_document, parse_json, read_documents


def outcomes(path: Path) -> list[Outcome]:
    config = ExtractConfig(inputs=(str(path),))
    return [item for block in input_blocks([str(path)], "auto", 1 << 26) for item in read_outcomes(block, config=config)]


def documents(path: Path) -> list[Document]:
    return [item for item in outcomes(path) if isinstance(item, Document)]


def faults(path: Path) -> list[tuple[str, str]]:
    return [(item.kind, item.where) for item in outcomes(path) if isinstance(item, MalformedRecord)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "x": NaN}', {"text": "a", "x": None}),
        ('{"text": "a", "x": [1.5, -Infinity, {"y": Infinity}]}', {"text": "a", "x": [1.5, None, {"y": None}]}),
        ('{"text": "broken \\ud83d here"}', {"text": "broken \ufffd here"}),
        ('{"text": "\\ude00\\ud83d"}', {"text": "\ufffd\ufffd"}),
        ('{"text": "\\ud83d\\ude00 whole, \\udc00 half", "k\\ud800": 1}', {"text": "😀 whole, \ufffd half", "k\ufffd": 1}),
        ('{"text": "a", "x": NaN, "n": 1234567890123456789012}', {"text": "a", "x": None, "n": 1234567890123456789012.0}),
    ],
)  # fmt: skip
def test_what_json_has_not_costs_no_line(line: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert parse_json(line.encode()) == expected
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (document,) = documents(tmp_path / "a.jsonl")
    assert document.text == expected["text"]
    assert json.loads(format_document(document))["text"] == expected["text"]
    whole = json.loads(line)
    whole |= {"id": "i", "source": "s"}
    assert parse_document(json.dumps(whole).encode(), where="x").text == expected["text"]


@pytest.mark.parametrize("line", ['{"text": NaNa}', '{"text": "\\u12"}', '{"text": "a" NaN}', "NaN", '{"text": "\\ud83d'])
def test_what_is_no_json_is_still_a_fault(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert documents(tmp_path / "a.jsonl") == []
    assert [kind for kind, _ in faults(tmp_path / "a.jsonl")] == ["line that is not JSON"]
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: not valid JSON"):
        list(read_documents(tmp_path / "a.jsonl"))


def bad_strings(*cells: bytes) -> pa.Array:
    """A column of strings of which some are no UTF-8, as other writers make them."""
    binary = pa.array(cells, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(cells), binary.buffers())


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"one", "zwei ä".encode(), b"three"], pa.binary()),
        pa.array([b"one", "zwei ä".encode(), b"three"], pa.large_binary()),
        pa.array(["one", "zwei ä", "three"], pa.large_string()),
        pa.array(["one", "zwei ä", "three"]).dictionary_encode(),
    ],
    ids=["binary", "large_binary", "large_string", "dictionary"],
)
def test_every_kind_of_text_column_is_read(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [document.text for document in documents(tmp_path / "a.parquet")] == ["one", "zwei ä", "three"]
    assert faults(tmp_path / "a.parquet") == []


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_a_bad_cell_of_text_costs_its_row(kind: str, tmp_path: Path) -> None:
    cells = (b"one", b"caf\xe9s", b"three")
    column = bad_strings(*cells) if kind == "string" else pa.array(cells, pa.binary())
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert [(d.id, d.text, d.meta) for d in documents(tmp_path / "a.parquet")] == [
        ("a.parquet:0", "one", {"n": 1}),
        ("a.parquet:2", "three", {"n": 3}),
    ]
    assert faults(tmp_path / "a.parquet") == [("cell that cannot be read", "a.parquet: row 1, column text")]


def test_a_bad_cell_of_another_column_costs_itself(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "note": bad_strings(b"fine", b"\xff"), "raw": [b"ok", b"\xfe"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [d.meta for d in documents(tmp_path / "a.parquet")] == [{"note": "fine", "raw": "ok"}, {"note": None, "raw": None}]
    assert faults(tmp_path / "a.parquet") == [
        ("cell that cannot be read", "a.parquet: row 1, column note"),
        ("cell that cannot be read", "a.parquet: row 1, column raw"),
    ]


def damage(path: Path, group: int, column: str) -> None:
    """Overwrite the pages of a column in a row group."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    (chunk,) = (metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == column)
    start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("column", "expected", "kind"),
    [
        ("n", {0: {"n": 0}, 1: {"n": 1}, 2: {}, 3: {}, 4: {"n": 4}, 5: {"n": 5}}, "column that cannot be read"),
        ("text", {0: {"n": 0}, 1: {"n": 1}, 4: {"n": 4}, 5: {"n": 5}}, "column that cannot be read"),
    ],
)
def test_a_damaged_column_costs_itself_or_its_row_group(
    column: str, expected: dict[int, Any], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(6)], "n": list(range(6))}), path, row_group_size=2)
    damage(path, 1, column)
    assert {int(d.id.split(":")[1]): d.meta for d in documents(path)} == expected
    assert [found for found, _ in faults(path)] == [kind]


TEXT = b'{"text": "The harbour was quiet."}\n'


@pytest.mark.parametrize("window_log", [28, 30, 31])
def test_zstd_windows_of_up_to_2_gib_are_read(window_log: int, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=False, hash_log=6, chain_log=6)
    stream = zstandard.ZstdCompressor(
        compression_params=parameters
    ).compressobj()  # the size is unknown: the window is declared
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(TEXT) + stream.flush())
    assert [d.text for d in documents(tmp_path / "a.jsonl.zst")] == ["The harbour was quiet."]
    assert faults(tmp_path / "a.jsonl.zst") == []


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_dictionary_in_the_first_frame_is_used(compressed: bool, frames: int, tmp_path: Path) -> None:
    samples = [b'{"text": "Sample %d of a text about the harbour and the river."}\n' % i for i in range(2000)]
    dictionary = zstandard.train_dictionary(2048, samples)
    content = zstandard.ZstdCompressor().compress(dictionary.as_bytes()) if compressed else dictionary.as_bytes()
    head = b"\x5d\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content
    body = b"".join(zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[i]) for i in range(frames))
    (tmp_path / "a.jsonl.zst").write_bytes(head + body)
    assert len(documents(tmp_path / "a.jsonl.zst")) == frames
    assert faults(tmp_path / "a.jsonl.zst") == []
    (tmp_path / "a.jsonl.zst").write_bytes(head[:100])
    assert [kind for kind, _ in faults(tmp_path / "a.jsonl.zst")] == ["truncated file"]


def test_datasets_with_cells_that_cannot_be_read(tmp_path: Path) -> None:
    """Text as strings, bytes or large strings; a bad cell in the text or beside it; pictures."""
    from datasets import Dataset, Features, Image, Value

    plain = pa.array(["one", "two", "six"])
    bad = pa.Array.from_buffers(pa.string(), 3, [None, plain.buffers()[1], pa.py_buffer(b"one\xffwosix")])
    picture = pa.array([{"bytes": b"\xff", "path": None}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {
        "string": (bad, ["one", "six"]),
        "large_binary": (pa.array([b"one", b"\xffwo", b"six"], pa.large_binary()), ["one", "six"]),
        "large_string": (plain.cast(pa.large_string()), ["one", "two", "six"]),
    }
    for kind, (column, expected) in columns.items():
        features = Features({"words": Value(kind), "other": Value("string"), "picture": Image()})
        table = pa.table({"words": column, "other": bad, "picture": picture})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
        Dataset(table).save_to_disk(str(tmp_path / kind))
        found = list(datasets_outcomes(Block(f"datasets:{tmp_path / kind}", "x"), "web", "words", "train"))
        texts = [item for item in found if isinstance(item, Document)]
        assert [item.text for item in texts] == expected, kind
        assert all("picture" not in item.meta for item in texts)
        assert texts[0].meta["other"] == "one"
        places = {item.where for item in found if isinstance(item, MalformedRecord)}
        assert {place.partition(": ")[2] for place in places} >= {f"row 1, column {'other' if len(expected) == 3 else 'words'}"}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "count", "num_faults"),
    [
        ("f01_nan.jsonl", 3, 0),
        ("f02_surrogate.jsonl", 2, 0),
        ("f03_bigint.jsonl", 1, 0),
        ("f06_bomcrlf.jsonl", 2, 0),
        ("f10_multi.jsonl.gz", 3, 0),
        ("f11_long31.jsonl.zst", 1, 0),
        ("f12_dict.warc.zst", 3, 0),
        ("f12_nodict.warc.zst", 3, 0),
        ("f13_binary.parquet", 2, 0),
        ("f14_badutf8.parquet", 1, 1),
        ("f15_ns.parquet", 2, 0),
        ("f17_dict_map.parquet", 2, 0),
    ],
)
def test_trials_of_formats(shared_data: Path, name: str, count: int, num_faults: int) -> None:
    path = shared_data / "trials" / name
    assert (len(documents(path)), len(faults(path))) == (count, num_faults)
