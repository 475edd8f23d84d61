"""What readers hold in memory is bounded: pieces of compressed files, lines, texts; beyond a limit is a Fault by name."""

import bz2
import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard

from megagpt.corpus.readers import records
from megagpt.corpus.readers.mediawiki import CHUNK_BYTES, read_pages
from megagpt.corpus.readers.records import jsonl_outcomes, text_outcomes
from megagpt.corpus.runner.blocks import Block, MalformedRecord
from megagpt.documents import Document, decompressed


@pytest.mark.parametrize("tail", [b"", b"<page><title>T</title><ns>0</ns><text>last</text></page>"])
def test_a_bz2_file_is_decompressed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes) -> None:
    """Less than 1 KB holds 10 MB here; at a call per 64 KiB of input, 6 KB gave 4.8 GB at once."""
    sizes, decoder_of = list[int](), bz2.BZ2Decompressor

    class Watched:
        def __init__(self) -> None:
            self.decoder = decoder_of()

        def __getattr__(self, name: str) -> object:
            return getattr(self.decoder, name)

        def decompress(self, data: bytes, limit: int = -1) -> bytes:
            plain = self.decoder.decompress(data, limit)
            sizes.append(len(plain))
            return plain

    (tmp_path / "a.xml.bz2").write_bytes(bz2.compress(b"<page>" + bytes(10_000_000) + b"</page>" + tail))
    monkeypatch.setattr("megagpt.corpus.readers.mediawiki.bz2.BZ2Decompressor", Watched)
    monkeypatch.setattr("megagpt.corpus.readers.mediawiki.MAX_PAGE_BYTES", 3_000_000)
    items = list(read_pages(Block(str(tmp_path / "a.xml.bz2"), "x")))
    assert sum(sizes) == 10_000_013 + len(tail)
    assert max(sizes) <= CHUNK_BYTES
    assert items[0] == MalformedRecord("page longer than 64 MiB", "a.xml.bz2: offset 0+0")
    assert [item.text for item in items if not isinstance(item, MalformedRecord)] == ["last"] * bool(tail)


def test_a_cut_bz2_stream_is_counted_though_it_ends_within_a_piece(tmp_path: Path) -> None:
    whole = bz2.compress(b"<page><title>T</title><text>" + b"word " * 200_000 + b"</text></page>", 1)
    for cut in (20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.xml.bz2").write_bytes(whole[:cut])
        faults = [
            item.kind for item in read_pages(Block(str(tmp_path / "a.xml.bz2"), "x")) if isinstance(item, MalformedRecord)
        ]
        assert "truncated bz2 stream" in faults


@pytest.mark.parametrize(("ending", "size", "limit"), [(".zst", 200 << 20, 128 << 20), (".gz", 20 << 20, 5 << 20)])
def test_other_files_are_decompressed_in_pieces(ending: str, size: int, limit: int) -> None:
    plain = bytes(size)
    data = zstandard.ZstdCompressor().compress(plain) if ending == ".zst" else gzip.compress(plain, 1)
    sizes = [len(piece) for piece in decompressed(io.BytesIO(data), ending)]
    assert sum(sizes) == len(plain)
    assert max(sizes) <= limit
    with pytest.raises(EOFError):
        list(decompressed(io.BytesIO(data[:-3]), ending))


LINES = [json.dumps({"text": text}).encode() for text in ("one", "x" * 1000, "two", "y" * 101, "z" * 80, "three")]


def write_lines(path: Path) -> None:
    data = b"\n".join(LINES) + b"\n"
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_beyond_the_limit_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    write_lines(tmp_path / name)
    items = list(jsonl_outcomes(Block(str(tmp_path / name), "x"), "s", "text"))
    assert [item.text for item in items if isinstance(item, Document)] == ["one", "two", "z" * 80, "three"]
    offsets = [len(b"\n".join(LINES[:number])) + 1 for number in (1, 3)]
    assert [item for item in items if isinstance(item, MalformedRecord)] == [
        MalformedRecord("line longer than 64 MiB", f"{name}: offset {offset}") for offset in offsets
    ]


@pytest.mark.parametrize("start", [1, 14, 500, 1020, 1050])
def test_blocks_that_begin_in_a_long_line_cover_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    write_lines(tmp_path / "a.jsonl")
    path = str(tmp_path / "a.jsonl")
    whole = list(jsonl_outcomes(Block(path, "x"), "s", "text"))
    parts = [
        *jsonl_outcomes(Block(path, "x", 0, 0, start), "s", "text"),
        *jsonl_outcomes(Block(path, "x", 1, start), "s", "text"),
    ]
    assert parts == whole


def test_a_text_file_beyond_the_limit_is_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_TEXT_BYTES", 20)
    (tmp_path / "a.txt").write_text("first line\nsecond\nthird line\n")
    items = list(text_outcomes(Block(str(tmp_path / "a.txt"), "x"), "s", "line"))
    assert [item.text for item in items if isinstance(item, Document)] == ["first line", "second"]
    assert [item for item in items if isinstance(item, MalformedRecord)] == [
        MalformedRecord("text file longer than 1 GiB", "a.txt: offset 18")
    ]
