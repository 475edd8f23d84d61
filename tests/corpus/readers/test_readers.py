"""Readers of dumps: the counts of real files, and every kind of damage."""

import bz2
import functools
import gzip
import http.server
import os
import threading
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from webencodings.labels import LABELS

from megagpt.config import UserError
from megagpt.corpus.config import match_paths
from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.extract_documents import extract_documents, read_outcomes
from megagpt.corpus.extraction.wiki_pages import wiki_outcomes
from megagpt.corpus.readers.http import Message, charset_of, decode_body, decode_text, parse_message
from megagpt.corpus.readers.inputs import format_of, input_blocks, list_inputs
from megagpt.corpus.readers.mediawiki import read_pages
from megagpt.corpus.readers.warc import Record, read_records, split_gzip
from megagpt.corpus.runner.blocks import Block, MalformedRecord, Outcome, Seen
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.summary import stage_outputs
from megagpt.documents import Document, Rejected, read_documents

PAGE = "<html><body><p>" + "A sentence that is long enough to be the text of a page. " * 6 + "</p></body></html>"


def warc_record(kind: str, body: bytes, url: str = "http://example.org/", mime: str = "application/http") -> bytes:
    lines = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: {url}",
        f"Content-Type: {mime}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body + b"\r\n\r\n"


def response(page: bytes, headers: str = "Content-Type: text/html") -> bytes:
    return warc_record("response", f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + page)


def write_warc(path: Path, records: list[bytes]) -> Path:
    """A gzip member per record."""
    path.write_bytes(b"".join(gzip.compress(record) for record in records))
    return path


def outcomes(path: Path, **values: Any) -> list[Outcome]:
    return list(read_outcomes(Block(str(path), "x"), config=ExtractConfig(inputs=(str(path),), **values)))


def counts(items: list[Outcome]) -> tuple[int, Counter[str], Counter[str]]:
    """(kept, rejected by reason, faults by kind)."""
    rejected = Counter(item.reason for item in items if isinstance(item, Rejected))
    faults = Counter(item.kind for item in items if isinstance(item, MalformedRecord))
    return sum(isinstance(item, Document) for item in items), rejected, faults


def record_counts(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    records, faults = Counter[str](), Counter[str]()
    for item in read_records(Block(str(path), "x")):
        if isinstance(item, MalformedRecord):
            faults[item.kind] += 1
        else:
            records[item.type] += 1
    return dict(records), dict(faults)


# ---- real files


WEB_FILES: list[tuple[str, dict[str, int], dict[str, int]]] = [
    ("cc-main-2020-34.warc.gz", {"warcinfo": 1, "request": 17, "response": 16, "metadata": 16}, {}),
    ("iah-blackbook.warc.gz", {"warcinfo": 1, "response": 299, "request": 261, "metadata": 261}, {}),
    ("iah-blackbook.arc.gz", {"warcinfo": 1, "response": 299}, {}),
    ("archiveit-2698.warc.gz", {"warcinfo": 1, "response": 70, "revisit": 10, "request": 75, "metadata": 75}, {}),
    ("clueweb-quirk.warc.gz", {"warcinfo": 1, "response": 29}, {}),
    ("dolma-sample-0000.warc.gz", {"warcinfo": 1, "request": 22, "response": 22, "metadata": 1, "resource": 2}, {}),
    ("cc-2008-1213893279526_0.arc", {"warcinfo": 1, "response": 145}, {}),
    (
        "sparkwarc-sample.wet.gz",
        {"warcinfo": 1, "conversion": 68},
        {"record length reaches into the next record": 10},
    ),
    ("clipped.warc.gz", {"response": 1}, {"truncated record": 1, "truncated gzip member": 1}),
    ("block-sized-records.warc.gz", {"unknown": 3}, {}),
    ("whirlwind.warc.gz", {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1}, {}),
    ("whirlwind.warc.wet.gz", {"warcinfo": 1, "conversion": 1}, {}),
    ("daft-example.warc.gz", {"warcinfo": 1, "request": 17, "metadata": 1, "response": 11}, {}),
    ("warcio/example.warc", {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}, {}),
    ("warcio/example.warc.gz", {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}, {}),
    ("warcio/example.arc", {"warcinfo": 1, "response": 1}, {}),
    ("warcio/example.arc.gz", {"warcinfo": 1, "response": 1}, {}),
    ("warcio/example-space-in-url.arc", {"warcinfo": 1, "response": 1}, {"truncated record": 1}),
    ("warcio/example-bad.warc.gz.bad", {"warcinfo": 1, "response": 2, "request": 2, "revisit": 1}, {}),
    ("warcio/example-trunc.warc", {"warcinfo": 2, "response": 1, "request": 1}, {"garbage between records": 1}),
    ("warcio/bad.arc", {"response": 1}, {"garbage between records": 2}),
    ("warcio/post-test.warc.gz", {"response": 3, "request": 3}, {}),
    (
        "sparkwarc-sample.warc.gz",
        {"warcinfo": 1, "request": 6, "response": 6, "metadata": 5},
        {"record length reaches into the next record": 12, "truncated record": 1},
    ),
    ("sparkwarc-sample.wat", {"warcinfo": 1, "metadata": 15}, {"record length reaches into the next record": 1}),
    ("whirlwind.warc.wat.gz", {"warcinfo": 1, "metadata": 1}, {}),
    ("warcio/example-bad-non-chunked.warc.gz", {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}, {}),
    ("warcio/example-digest.warc", {"request": 4}, {}),
    ("warcio/example-iana.org-chunked.warc", {"warcinfo": 1, "response": 1, "request": 1}, {}),
    ("warcio/example-resource.warc.gz", {"warcinfo": 2, "resource": 1}, {}),
    ("warcio/example-space-in-target-uri.warc.gz", {"warcinfo": 1, "resource": 1}, {}),
    (
        "warcio/example-wget-bad-target-uri.warc.gz",
        {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1, "resource": 2},
        {},
    ),
    (
        "warcio/example-wrong-chunks.warc.gz",
        {"response": 1, "request": 1},
        {"truncated record": 1, "garbage between records": 1},
    ),
]
"""Records by type, faults."""


@pytest.mark.realdata
def test_every_web_file_is_counted_below(shared_data: Path) -> None:
    files = {str(path.relative_to(shared_data / "warc")) for path in (shared_data / "warc").rglob("*") if path.is_file()}
    assert files == {name for name, _, _ in WEB_FILES}


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "records", "faults"), WEB_FILES)
def test_record_counts(shared_data: Path, name: str, records: dict[str, int], faults: dict[str, int]) -> None:
    assert record_counts(shared_data / "warc" / name) == (records, faults)


@pytest.mark.realdata
def test_warc_and_arc_of_one_crawl_agree(shared_data: Path) -> None:
    bodies = []
    for name in ("iah-blackbook.warc.gz", "iah-blackbook.arc.gz"):
        records = [r for r in read_records(Block(str(shared_data / "warc" / name), "x")) if isinstance(r, Record)]
        bodies.append(sorted((r.url, r.body) for r in records if r.type == "response"))
    assert bodies[0] == bodies[1]


@pytest.mark.realdata
def test_false_encodings_lose_nothing(shared_data: Path) -> None:
    """14 captures of 2008 say gzip and 36 say chunked over bodies that are neither."""
    kinds = Counter[str]()
    lost = 0
    for record in read_records(Block(str(shared_data / "warc/cc-2008-1213893279526_0.arc"), "x")):
        assert isinstance(record, Record)
        message = parse_message(record.body)
        body, problems = decode_body(message)
        kinds.update(problems)
        kinds["chunked"] += message.headers.get("transfer-encoding") == "chunked"
        lost += body != message.body
    assert kinds["wrong Content-Encoding: the body is not gzip"] == 14
    assert kinds["chunked"] == 36
    assert kinds["wrong Transfer-Encoding: the body is not chunked"] == 35  # one of the 36 has an empty body
    assert lost == 0


@pytest.mark.realdata
def test_charsets_agree_with_common_crawls_own_detection(shared_data: Path) -> None:
    detected: dict[str | None, str] = {}
    ours: dict[str | None, str] = {}
    for record in read_records(Block(str(shared_data / "warc/cc-main-2020-34.warc.gz"), "x")):
        assert isinstance(record, Record)
        if record.type == "metadata":
            fields = dict(line.split(": ", 1) for line in record.body.decode().splitlines() if ": " in line)
            detected[record.url] = fields.get("charset-detected", "").lower()
        elif record.type == "response":
            message = parse_message(record.body)
            ours[record.url] = decode_text(decode_body(message)[0], charset_of(message.headers["content-type"])).charset
    same = {"gb18030": ("gb2312", "gbk", "gb18030"), "cp1252": ("iso-8859-1", "windows-1252"), "cp1251": ("windows-1251",)}
    wrong = {
        url: (charset, detected[url]) for url, charset in ours.items() if detected[url] not in same.get(charset, (charset,))
    }
    assert len(ours) == 16
    assert wrong == {}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "pages", "kept", "rejected"),
    [
        ("enwiki-articles1-shortened", 206, 106, {"source:redirect": 100}),
        ("enwiki-10k", 196, 68, {"source:redirect": 97, "source:namespace": 31}),
        ("simplewiki", 7, 6, {"source:namespace": 1}),
        ("enwiki-table-markup", 5, 5, {}),
        ("bgwiki-shortened", 3, 1, {"source:namespace": 2}),
    ],
)
def test_wikipedia_counts(shared_data: Path, name: str, pages: int, kept: int, rejected: dict[str, int]) -> None:
    items = outcomes(shared_data / f"wiki/{name}.xml.bz2")
    assert sum(item.count for item in items if isinstance(item, Seen)) == pages
    assert counts(items) == (kept, Counter(rejected), Counter())
    assert not any("\0" in item.text for item in items if isinstance(item, Document))


@pytest.mark.slow
@pytest.mark.realdata
def test_all_web_files_through_the_stage(shared_data: Path, tmp_path: Path) -> None:
    """Blocks of 200 kB give the documents of whole files; an id finds its record again."""
    patterns = (str(shared_data / "warc/*.warc.gz"), str(shared_data / "warc/*.arc.gz"))
    results = []
    for block_bytes in (200_000, 1 << 30):
        config = ExtractConfig(inputs=patterns)
        output = tmp_path / str(block_bytes)
        summary = extract_documents(config, output, Execution(num_workers=2, block_bytes=block_bytes))
        assert summary.records["response"] == 16 + 299 * 2 + 70 + 29 + 22 + 1 + 1 + 11 + 6
        results.append([document for path in stage_outputs(output) for document in read_documents(path)])
    assert results[0] == results[1]
    assert len({document.id for document in results[0]}) == len(results[0])
    name, _, offset = next(document.id for document in results[0] if document.id.startswith("iah-blackbook.warc")).rpartition(
        ":"
    )
    with (shared_data / "warc" / name).open("rb") as file:
        file.seek(int(offset))
        assert gzip.GzipFile(fileobj=file).readline().startswith(b"WARC/")


# ---- damaged files made here


def test_truncated_gzip_member(tmp_path: Path) -> None:
    path = write_warc(tmp_path / "a.warc.gz", [response(PAGE.encode())] * 3)
    path.write_bytes(path.read_bytes()[:-60])
    kept, _, faults = counts(outcomes(path))
    assert kept >= 2
    assert faults["truncated gzip member"] == 1


def test_damaged_member_costs_only_itself(tmp_path: Path) -> None:
    noise = "".join(chr(33 + i * 7919 % 90) for i in range(3000))
    records = [response(f"<p>{PAGE}{noise}{i}</p>".encode()) for i in range(5)]
    members = [gzip.compress(record) for record in records]
    broken = bytearray(members[2])
    broken[60:90] = bytes(30)
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join([*members[:2], bytes(broken), *members[3:]]))
    kept, _, faults = counts(outcomes(path))
    assert kept == 4
    assert faults["damaged compressed data"] == 1


def test_garbage_between_records(tmp_path: Path) -> None:
    good = response(PAGE.encode())
    between_members = tmp_path / "a.warc.gz"
    between_members.write_bytes(gzip.compress(good) + b"garbage \x1f\x8b\x08 garbage" * 9 + gzip.compress(good))
    assert counts(outcomes(between_members)) == (2, Counter(), Counter({"garbage between gzip members": 1}))
    between_lines = tmp_path / "b.warc"
    between_lines.write_bytes(good + b"garbage\nWARC/x\n\n" + good)
    items = outcomes(between_lines)
    assert counts(items) == (2, Counter(), Counter({"garbage between records": 1}))
    assert [item.where for item in items if isinstance(item, MalformedRecord)] == [f"b.warc: offset {len(good)}"]
    padded = tmp_path / "c.warc.gz"
    padded.write_bytes(gzip.compress(good) + bytes(1000) + gzip.compress(good) + bytes(100))
    assert counts(outcomes(padded)) == (2, Counter(), Counter())


@pytest.mark.parametrize("length", ["-5", "x", "", "99999999999"])
def test_wrong_content_length(tmp_path: Path, length: str) -> None:
    good = response(PAGE.encode())
    start = good.index(b"Content-Length: ") + 16
    bad = good[:start] + length.encode() + good[good.index(b"\r\n", start) :]
    path = write_warc(tmp_path / "a.warc.gz", [bad, good])
    kept, _, faults = counts(outcomes(path))
    assert kept == 1
    assert faults.total() >= 1


@pytest.mark.parametrize("more", [5000, 100 << 20])
@pytest.mark.parametrize("name", ["a.warc", "a.warc.zst"])
def test_a_length_past_the_end_hides_no_record(tmp_path: Path, name: str, more: int) -> None:
    records = [response(PAGE.encode()) for _ in range(4)]
    start = records[1].index(b"Content-Length: ") + 16
    end = records[1].index(b"\r\n", start)
    records[1] = records[1][:start] + b"%d" % (int(records[1][start:end]) + more) + records[1][end:]
    data = b"".join(records)
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    items = outcomes(tmp_path / name)
    documents = [item for item in items if isinstance(item, Document)]
    assert len(documents) >= 3
    assert not any("HTTP/1.1" in document.text for document in documents)
    assert counts(items)[2].total() == 1


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    for name in ("a.txt.bz2", "a.jsonl.bz2", "a.xml.gz", "a.warc.bz2"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}.*is not read from"):
            input_blocks([str(tmp_path / name)], "auto", 1 << 20)


def test_a_byte_order_mark_costs_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert [item.text for item in outcomes(path) if isinstance(item, Document)] == ["one", "two"]


@pytest.mark.parametrize(
    ("headers", "body", "problem"),
    [
        ("Content-Encoding: gzip", PAGE.encode(), "wrong Content-Encoding: the body is not gzip"),
        ("Content-Encoding: br", PAGE.encode(), "wrong Content-Encoding: the body is not br"),
        ("Content-Encoding: weird", PAGE.encode(), "unknown Content-Encoding"),
        ("Transfer-Encoding: chunked", PAGE.encode(), "wrong Transfer-Encoding: the body is not chunked"),
        ("Content-Encoding: gzip", gzip.compress(PAGE.encode(), mtime=0), None),
        ("Content-Encoding: gzip", gzip.compress(PAGE.encode(), mtime=0)[:-9], "truncated or damaged compressed body"),
        ("Content-Encoding: zstd", zstandard.compress(PAGE.encode()), None),
        ("Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(PAGE), PAGE.encode()), None),
        ("Transfer-Encoding: chunked", b"%x\r\n%s\r\n5\r\n" % (len(PAGE), PAGE.encode()), "truncated chunked body"),
    ],
)
def test_content_encodings(tmp_path: Path, headers: str, body: bytes, problem: str | None) -> None:
    path = write_warc(tmp_path / "a.warc.gz", [response(body, f"Content-Type: text/html\r\n{headers}")])
    kept, _, faults = counts(outcomes(path))
    assert kept == 1
    assert faults == Counter([problem] if problem else [])


@pytest.mark.parametrize(
    ("body", "declared", "charset", "text", "problems"),
    [
        ("größe".encode(), "utf-8", "utf-8", "größe", ()),
        ("größe".encode("latin-1"), "iso-8859-1", "cp1252", "größe", ()),
        ("größe".encode(), "iso-8859-1", "utf-8", "größe", ()),
        ("größe".encode(), "uft-8", "utf-8", "größe", ("unknown charset",)),
        ("größe".encode(), "rot13", "utf-8", "größe", ("unknown charset",)),
        ("größe".encode(), "zlib_codec", "utf-8", "größe", ("unknown charset",)),
        ("größe".encode(), "unicode_escape", "utf-8", "größe", ("unknown charset",)),
        (b"\xff\xfe" + "größe".encode("utf-16-le"), "utf-8", "utf-16-le", "größe", ()),
        (
            b'<meta charset="windows-1251">' + "привет".encode("cp1251"),
            None,
            "cp1251",
            '<meta charset="windows-1251">привет',
            (),
        ),
        ("日本語のページです。".encode("euc-jp"), "euc-jp", "euc_jp", "日本語のページです。", ()),
        (b"caf\xe9 \xc3\xa9", "utf-8", "utf-8", "caf\ufffd é", ("invalid UTF-8",)),
        (b"plain", None, "utf-8", "plain", ()),
    ],
)
def test_charsets(body: bytes, declared: str | None, charset: str, text: str, problems: tuple[str, ...]) -> None:
    decoded = decode_text(body, declared)
    assert (decoded.charset, decoded.text, decoded.problems) == (charset, text, problems)


@pytest.mark.parametrize("label", sorted(LABELS))
def test_labels_of_browsers_are_known_charsets(label: str) -> None:
    problems = decode_text(b"plain text", label).problems
    # "replacement" stands for charsets that browsers refuse to decode; Python has no codec for these three labels
    assert problems == (("unknown charset",) if label in ("iso-2022-cn", "iso-2022-cn-ext", "replacement") else ())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (response(b""), "source:empty"),
        (response(bytes(range(256)) * 20), "source:undecodable"),
        (response(PAGE.encode(), "Content-Type: image/png"), "source:mime"),
        (response(b"<html><body></body></html>"), "source:no_text"),
        (
            warc_record("response", b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n" + PAGE.encode()),
            "source:status",
        ),
        (warc_record("conversion", b"  ", mime="text/plain"), "source:empty"),
    ],
)
def test_rejected_pages(tmp_path: Path, record: bytes, reason: str) -> None:
    path = write_warc(tmp_path / "a.warc.gz", [record, response(PAGE.encode())])
    kept, rejected, _ = counts(outcomes(path))
    assert (kept, rejected) == (1, Counter([reason]))


def test_invalid_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    page = PAGE.replace("sentence", "sen\udcfftence", 1).encode("utf-8", "surrogateescape")
    path = write_warc(tmp_path / "a.warc.gz", [response(page, "Content-Type: text/html; charset=utf-8")])
    items = outcomes(path)
    assert counts(items) == (1, Counter(), Counter({"invalid UTF-8": 1}))
    assert "sen\ufffdtence" in next(item.text for item in items if isinstance(item, Document))


def test_compressions_read_alike(tmp_path: Path) -> None:
    """Per record, one member for all, zstd and plain give the same documents; offsets say where each is."""
    records = [response(PAGE.encode()) for _ in range(4)]
    joined = b"".join(records)
    files = {
        "per.warc.gz": b"".join(map(gzip.compress, records)),
        "one.warc.gz": gzip.compress(joined),
        "z.warc.zst": zstandard.compress(joined),
        "p.warc": joined,
    }
    texts = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        documents = [item for item in outcomes(tmp_path / name) if isinstance(item, Document)]
        assert len({document.id for document in documents}) == 4
        texts.append([document.text for document in documents])
    assert texts == [texts[0]] * 4
    assert [d.id for d in outcomes(tmp_path / "one.warc.gz") if isinstance(d, Document)][
        1
    ] == f"one.warc.gz:0+{len(records[0])}"
    assert [d.id for d in outcomes(tmp_path / "p.warc") if isinstance(d, Document)][1] == f"p.warc:{len(records[0])}"


def test_gzip_blocks_cover_every_record_once(tmp_path: Path) -> None:
    path = write_warc(tmp_path / "a.warc.gz", [response(f"{PAGE}{i}".encode()) for i in range(50)])
    whole = [r.where for r in read_records(Block(str(path), "x")) if isinstance(r, Record)]
    for block_bytes in (100, 333, 5000):
        ranges = split_gzip(path, block_bytes)
        parts = [r.where for a, b in ranges for r in read_records(Block(str(path), "x", 0, a, b)) if isinstance(r, Record)]
        assert parts == whole
    one_member = tmp_path / "b.warc.gz"
    one_member.write_bytes(gzip.compress(b"".join(response(f"{PAGE}{i}{i * i}".encode()) for i in range(50))))
    assert split_gzip(one_member, 100) == [(0, None)]


# ---- Wikipedia


def wiki_page(title: str, text: str, namespace: int = 0) -> str:
    return f"<page><title>{title}</title><ns>{namespace}</ns><id>7</id><revision><text>{text}</text></revision></page>\n"


def test_truncated_xml(tmp_path: Path) -> None:
    xml = "<mediawiki>" + wiki_page("A", "Text of A.") + wiki_page("B", "Text of B.") + wiki_page("C", "Text of C.")[:40]
    cut_inside = "<mediawiki>" + wiki_page("A", "Text of A.")[:60] + wiki_page("B", "Text of B.")
    for name, content, kept in (("a.xml", xml, 2), ("b.xml", cut_inside, 1)):
        (tmp_path / name).write_text(content)
        assert counts(outcomes(tmp_path / name)) == (kept, Counter(), Counter({"truncated page": 1}))
    (tmp_path / "page.xml").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    assert counts(outcomes(tmp_path / "page.xml")) == (0, Counter(), Counter({"no MediaWiki dump": 1}))
    data = bz2.compress(xml.encode())
    (tmp_path / "c.xml.bz2").write_bytes(data[:-10])
    assert counts(outcomes(tmp_path / "c.xml.bz2"))[2]["truncated bz2 stream"] == 1


def test_multistream_blocks_cover_every_page_once(tmp_path: Path) -> None:
    pages = [wiki_page(f"Page {i}", f"Text of page {i}. " * (1 + i % 5)) for i in range(60)]
    xml = "<mediawiki>\n" + "".join(pages) + "</mediawiki>"
    whole_pages = [xml[: xml.index("<page>")]] + ["".join(pages[i : i + 7]) for i in range(0, 60, 7)] + ["</mediawiki>"]
    anywhere = [xml[i : i + 701] for i in range(0, len(xml), 701)]
    for name, pieces in (("a.xml.bz2", whole_pages), ("b.xml.bz2", anywhere)):
        path = tmp_path / name
        path.write_bytes(b"".join(bz2.compress(piece.encode()) for piece in pieces))
        for block_bytes in (97, 400, 1 << 20):
            config = ExtractConfig(inputs=(str(path),))
            blocks = input_blocks([str(path)], "auto", block_bytes)
            assert (len(blocks) > 3) == (block_bytes < 1000)
            titles = [d.meta["title"] for b in blocks for d in read_outcomes(b, config=config) if isinstance(d, Document)]
            assert titles == [f"Page {i}" for i in range(60)]
    plain = tmp_path / "c.xml"
    plain.write_text(xml)
    ids = [
        [i.where for b in input_blocks([str(plain)], "auto", n) for i in read_pages(b) if not isinstance(i, MalformedRecord)]
        for n in (99, 10**9)
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 60


def test_damaged_stream_costs_only_itself(tmp_path: Path) -> None:
    streams = [bz2.compress(wiki_page(f"P{i}", f"Text {i}.").encode()) for i in range(4)]
    broken = bytearray(streams[1])
    broken[40:50] = bytes(10)
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(streams[0] + bytes(broken) + streams[2] + b"garbage" + streams[3])
    faults = {"damaged bz2 stream": 1, "garbage between bz2 streams": 1}
    assert counts(outcomes(path)) == (3, Counter(), Counter(faults))


def test_utf16_dump_and_other_namespaces(tmp_path: Path) -> None:
    xml = (
        "<mediawiki>"
        + wiki_page("Ж", "Текст.")
        + wiki_page("Talk:Ж", "x", 1)
        + wiki_page("R", "#REDIRECT [[Ж]]")
        + "</mediawiki>"
    )
    (tmp_path / "a.xml").write_bytes(xml.encode("utf-16"))
    items = list(wiki_outcomes(Block(str(tmp_path / "a.xml"), "x"), "wiki"))
    assert counts(items) == (1, Counter({"source:namespace": 1, "source:redirect": 1}), Counter())
    assert [item.text for item in items if isinstance(item, Document)] == ["Ж\nТекст."]


# ---- files that hold text


def jsonl_lines() -> list[bytes]:
    good = [orjson.dumps({"text": f"text {i}", "url": f"http://x/{i}", "lang": "en"}) for i in range(20)]
    return [*good[:5], b"not json", b'{"body": "no text"}', b"[1]", b"", *good[5:]]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl(tmp_path: Path, ending: str) -> None:
    data = b"\n".join(jsonl_lines()) + b"\n"
    path = tmp_path / f"a.{ending}"
    path.write_bytes({"jsonl": data, "jsonl.gz": gzip.compress(data), "jsonl.zst": zstandard.compress(data)}[ending])
    items = outcomes(path, source="s")
    faults = {"line that is not JSON": 1, "line without a text in 'text'": 2}
    assert counts(items) == (20, Counter(), Counter(faults))
    first, second = [item for item in items if isinstance(item, Document)][:2]
    assert first == Document("a." + ending + ":0", "text 0", "s", "http://x/0", {"lang": "en"})
    assert second.id == f"a.{ending}:{len(jsonl_lines()[0]) + 1}"
    path.write_bytes(path.read_bytes()[:-9])
    assert counts(outcomes(path))[2].total() == 4 - (ending == "jsonl.zst") * 3


def test_jsonl_blocks_cover_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(jsonl_lines()))
    config = ExtractConfig(inputs=(str(path),))
    whole = outcomes(path)
    for block_bytes in (1, 7, 64, 500):
        blocks = input_blocks([str(path)], "auto", block_bytes)
        assert [item for block in blocks for item in read_outcomes(block, config=config)] == whole


def test_text_units(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree ü\n")
    expected = {"file": ["one\ntwo\n\nthree ü"], "paragraph": ["one\ntwo", "three ü"], "line": ["one", "two", "three ü"]}
    for unit, texts in expected.items():
        documents = [item for item in outcomes(path, text_unit=unit) if isinstance(item, Document)]
        assert [document.text for document in documents] == texts
        data = path.read_bytes()
        assert [data[int(d.id.split(":")[1]) :].decode().lstrip("\n").startswith(d.text) for d in documents] == [True] * len(
            texts
        )


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"content": [f"text {i}" if i % 10 else "" for i in range(100)], "n": list(range(100))})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    config = ExtractConfig(inputs=(str(path),), text_field="content")
    for block_bytes in (100, 1 << 20):
        blocks = input_blocks([str(path)], "auto", block_bytes)
        items = [item for block in blocks for item in read_outcomes(block, config=config)]
        assert counts(items) == (90, Counter({"source:empty": 10}), Counter())
        documents = [item for item in items if isinstance(item, Document)]
        assert documents[0] == Document("a.parquet:1", "text 1", "web", None, {"n": 1})
    with pytest.raises(UserError, match="has no column 'text'"):
        outcomes(path)
    path.write_bytes(path.read_bytes()[:-9])
    (fault,) = outcomes(path, text_field="content")
    assert isinstance(fault, MalformedRecord)
    assert (fault.kind, fault.where[:11]) == ("damaged Parquet file", "a.parquet: ")


@pytest.mark.slow
def test_datasets_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"], "url": ["http://x/1", None]}).save_to_disk(str(tmp_path / "saved"))
    config = ExtractConfig(inputs=(f"datasets:{tmp_path}/saved",))
    summary = extract_documents(config, tmp_path / "out", Execution(num_workers=1))
    assert (summary.kept, summary.records) == (2, {"row": 2})
    documents = list(read_documents(stage_outputs(tmp_path / "out")[0]))
    assert [(document.text, document.url) for document in documents] == [("one", "http://x/1"), ("two", None)]


# ---- naming inputs


def test_lists_of_paths_and_globs(tmp_path: Path) -> None:
    for name in ("a.warc.gz", "b.warc.gz"):
        write_warc(tmp_path / name, [response(PAGE.encode())])
    (tmp_path / "warc.paths.gz").write_bytes(gzip.compress(b"b.warc.gz\na.warc.gz\n"))
    assert list_inputs((str(tmp_path / "warc.paths.gz"),)) == [str(tmp_path / "b.warc.gz"), str(tmp_path / "a.warc.gz")]
    both = (str(tmp_path / "*.warc.gz"), str(tmp_path / "warc.paths.gz"))
    assert list_inputs(both) == [str(tmp_path / "a.warc.gz"), str(tmp_path / "b.warc.gz")]
    assert list_inputs((str(tmp_path / "warc.paths.gz"),), root="https://h/x/")[0] == "https://h/x/b.warc.gz"


def test_url_is_read_like_a_file(tmp_path: Path) -> None:
    path = write_warc(tmp_path / "a.warc.gz", [response(PAGE.encode())])
    config = ExtractConfig(inputs=(path.as_uri(),))
    summary = extract_documents(config, tmp_path / "out", Execution(num_workers=1))
    assert summary.kept == 1
    assert next(read_documents(tmp_path / "out/a.warc.jsonl.zst")).id == "a.warc.gz:0"


def test_mistakes_in_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches"):
        list_inputs((str(tmp_path / "*.warc.gz"),))
    with pytest.raises(UserError, match="is a folder"):
        list_inputs((str(tmp_path),))
    with pytest.raises(UserError, match="does not tell its format"):
        format_of("x.bin", "auto")
    (tmp_path / "l.paths").write_text("gone.warc.gz\n")
    with pytest.raises(UserError, match=r"gone\.warc\.gz: no such file"):
        input_blocks(list_inputs((str(tmp_path / "l.paths"),)), "auto", 100)
    whole = gzip.compress(b"a.warc.gz\n" * 50)
    for name, content in (("cut.paths.gz", whole[:-9]), ("bent.paths.gz", whole[:12] + b"\xff" + whole[13:])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: a list of paths, cut off or damaged after line \d+"):
            list_inputs((str(tmp_path / name),))
    for content in (b"", b"\n \r\n"):
        (tmp_path / "empty.paths").write_bytes(content)
        with pytest.raises(UserError, match=r"empty\.paths: a list of paths with no path in it"):
            list_inputs((str(tmp_path / "empty.paths"),))
    (tmp_path / "mark.paths").write_bytes(b"\xef\xbb\xbf/x/a.warc.gz\r\n")
    assert list_inputs((str(tmp_path / "mark.paths"),)) == ["/x/a.warc.gz"]
    with pytest.raises(UserError, match=r"file:///.*/empty\.paths: a list of paths with no path"):
        list_inputs(((tmp_path / "empty.paths").as_uri(),))
    (tmp_path / "latin.paths").write_bytes(b"a.warc.gz\n\xe9.warc.gz\n")
    with pytest.raises(UserError, match=r"latin\.paths: a list of paths, cut off or damaged after line 1"):
        list_inputs((str(tmp_path / "latin.paths"),))


def test_file_names_of_any_kind(tmp_path: Path) -> None:
    plain = tmp_path / "part [1].jsonl"
    plain.write_text('{"text": "x"}\n')
    assert list_inputs((str(plain),)) == [str(plain)]
    assert match_paths((str(plain),), "filter.inputs") == [plain]
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    assert list_inputs((f"{folder}/*.jsonl",)) == [f"{folder}/a.jsonl"]
    Path(f"{folder}.jsonl").write_text('{"text": "x"}\n')
    for listed in (list_inputs, lambda patterns: match_paths(patterns, "extract.inputs")):
        with pytest.raises(UserError, match=r"extract\.inputs: the file name .*caf\\xe9\.jsonl' is not UTF-8"):
            listed((str(tmp_path / "*.jsonl"),))


# ---- nothing hangs, nothing but Faults and UserErrors comes out


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 900), st.sampled_from(["plain", "gz", "one"]))
def test_fuzzed_warc(tmp_path_factory: pytest.TempPathFactory, noise: bytes, position: int, kind: str) -> None:
    """Noise put anywhere in a file of three records: every byte is passed, the records untouched by it mostly survive."""
    records = [response(PAGE.encode())] * 3
    data = {"plain": b"".join(records), "gz": b"".join(map(gzip.compress, records)), "one": gzip.compress(b"".join(records))}[
        kind
    ]
    path = tmp_path_factory.getbasetemp() / f"fuzz.warc{'' if kind == 'plain' else '.gz'}"
    path.write_bytes(data[:position] + noise + data[position:])
    found = list(read_records(Block(str(path), "x")))
    assert all(isinstance(item, Record | MalformedRecord) for item in found)
    if kind == "gz" and noise and position:
        assert sum(isinstance(item, Record) for item in found) >= 2


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_fuzzed_jsonl_and_http(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + noise + b'\n{"text": "b"}\n')
    kept, _, _ = counts(outcomes(path))
    assert kept >= 2
    message = parse_message(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip, deflate\r\n\r\n" + noise)
    body, _ = decode_body(message)
    decode_text(body, noise[:8].decode("latin-1"))
    decode_body(Message(200, {"content-encoding": noise[:5].decode("latin-1")}, noise))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 700), st.sampled_from(["plain", "one", "multistream"]))
def test_fuzzed_wikipedia_dump(tmp_path_factory: pytest.TempPathFactory, noise: bytes, position: int, kind: str) -> None:
    """Noise put anywhere in a dump of three pages; the pages of streams without it survive."""
    pages = [wiki_page(f"P{i}", f"Text of page {i}.").encode() for i in range(3)]
    data = {"plain": b"".join(pages), "one": bz2.compress(b"".join(pages)), "multistream": b"".join(map(bz2.compress, pages))}[
        kind
    ]
    path = tmp_path_factory.getbasetemp() / f"fuzz.xml{'' if kind == 'plain' else '.bz2'}"
    path.write_bytes(data[:position] + noise + data[position:])
    kept, _, _ = counts(outcomes(path))
    if kind == "multistream":
        assert kept >= 2


def test_control_characters_become_spaces() -> None:
    controls = [c for c in range(0xA0) if unicodedata.category(chr(c)) == "Cc" and chr(c) not in "\t\n\f\r\x85"]
    for code in range(0x2100):
        decoded = decode_text(f"a{chr(code)}é".encode(), "utf-8")
        assert decoded.text == ("a é" if code in controls else f"a{chr(code)}é")
        assert (decoded.unreadable > 0) == (code in controls)


def test_urls_that_nothing_here_can_read_are_refused() -> None:
    with pytest.raises(UserError, match=r"gopher://h/a\.warc\.gz: cannot be read here: Protocol not known"):
        input_blocks(["gopher://h/a.warc.gz"], "auto", 1 << 20)


def test_a_signature_in_a_url_is_in_no_name_and_no_message() -> None:
    signed = "http://127.0.0.1:9/a/b.warc.gz?X-Amz-Signature=secret&X-Amz-Credential=key"
    (block,) = input_blocks([signed], "auto", 1 << 20)
    assert (block.name, block.path) == ("b.warc.jsonl.zst", signed)
    assert list_inputs((signed,)) == [signed]
    for url, message in (("gopher://h/a.warc.gz?secret=1", "cannot be read here"), ("http://h/a?secret=1", "does not tell")):
        with pytest.raises(UserError, match=message) as raised:
            input_blocks([url], "auto", 1 << 20)
        assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_https_style_url(tmp_path: Path) -> None:
    """A real server on this machine; what is missing is a clear error."""
    write_warc(tmp_path / "a.warc.gz", [response(PAGE.encode())] * 2)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            config = ExtractConfig(inputs=(f"{url}/a.warc.gz",))
            assert extract_documents(config, tmp_path / "out", Execution(num_workers=1)).kept == 2
            with pytest.raises(UserError, match=r"missing\.warc\.gz:? not found") as raised:
                extract_documents(
                    config.model_copy(update={"inputs": (f"{url}/missing.warc.gz?sig=secret",)}),
                    tmp_path / "two",
                    Execution(num_workers=1),
                )
            assert "secret" not in str(raised.value)
            signed = config.model_copy(update={"inputs": (f"{url}/a.warc.gz?sig=secret",)})
            assert extract_documents(signed, tmp_path / "three", Execution(num_workers=1)).kept == 2
            written = [path for path in (tmp_path / "three").rglob("*") if path.is_file()]
            assert not [path for path in written if b"secret" in path.read_bytes() or "secret" in path.name]
        finally:
            server.shutdown()
            thread.join()
