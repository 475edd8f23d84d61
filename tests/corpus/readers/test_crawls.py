"""Responses as crawlers really store them: interim responses, types, encodings, charsets, and records that are no pages."""

import gzip
import time
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard

from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.extract_documents import read_outcomes
from megagpt.corpus.readers.http import decode_body, decode_text, parse_message
from megagpt.corpus.readers.warc import Record, read_records
from megagpt.corpus.runner.blocks import Block, MalformedRecord
from megagpt.documents import Document, Rejected

LINES = [f"Sentence number {number} of the page is long enough to be taken for a paragraph of prose." for number in range(6)]
PAGE = "<html><body><article>" + "".join(f"<p>{line}</p>" for line in LINES) + "</article></body></html>"


def record(payload: bytes, *headers: str, kind: str = "response", url: str = "http://a.org/x") -> bytes:
    mime = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = [
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: {url}",
        f"Content-Type: {mime}",
        *headers,
        f"Content-Length: {len(payload)}",
    ]
    return "\r\n".join(["WARC/1.0", *head, "", ""]).encode() + payload + b"\r\n\r\n"


def outcomes(tmp_path: Path, *records: bytes) -> list[Document | Rejected | MalformedRecord]:
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(records))
    config = ExtractConfig(inputs=(str(path),))
    found = read_outcomes(Block(str(path), "x"), config=config)
    return [item for item in found if isinstance(item, Document | Rejected | MalformedRecord)]


def response(head: str, body: bytes | str) -> bytes:
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + (body.encode() if isinstance(body, str) else body)


@pytest.mark.parametrize(
    "interim",
    [
        "HTTP/1.1 100 Continue",
        "HTTP/1.1 103 Early Hints\nLink: </a.css>; rel=preload",
        "HTTP/1.1 100 Continue\n\nHTTP/1.1 102 Processing",
    ],
)
def test_interim_responses_are_passed_over(interim: str) -> None:
    message = parse_message(response(interim, response("HTTP/1.1 200 OK\nContent-Type: text/html", PAGE)))
    assert (message.status, message.headers, message.body) == (200, {"content-type": "text/html"}, PAGE.encode())


def test_a_lone_interim_response_is_none() -> None:
    assert parse_message(response("HTTP/1.1 100 Continue", "")).status == 100


@pytest.mark.parametrize(
    ("declared", "identified"),
    [
        ("text/html, text/html; charset=utf-8", ""),
        ("application/x-thing, text/html", ""),
        ("application/octet-stream", "text/html"),
        ("image/jpeg", "application/xhtml+xml"),
        ("binary/octet-stream", ""),
        ("", "text/html"),
    ],
)
def test_types_of_pages(tmp_path: Path, declared: str, identified: str) -> None:
    payload = response("HTTP/1.1 200 OK" + (f"\nContent-Type: {declared}" if declared else ""), PAGE)
    headers = [f"WARC-Identified-Payload-Type: {identified}"] if identified else []
    (document,) = outcomes(tmp_path, record(payload, *headers))
    assert isinstance(document, Document)
    assert document.text.split("\n") == LINES


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("metadata://gnu.org/software/wget/warc/wget.log", "resource"),
        ("metadata://gnu.org/software/wget/warc/wget_arguments.txt", "resource"),
        ("urn:X-wpull:log", "resource"),
        ("dns:a.org", "resource"),
        ("https://a.org/robots.txt", "response"),
        ("https://a.org/.well-known/security.txt", "response"),
        ("https://a.org/app/cache.appcache?v=2", "response"),
    ],
)
def test_records_that_are_no_pages(tmp_path: Path, url: str, kind: str) -> None:
    text = "Line of a log\n" * 20
    payload = response("HTTP/1.1 200 OK\nContent-Type: text/plain", text) if kind == "response" else text.encode()
    (rejected,) = outcomes(tmp_path, record(payload, kind=kind, url=url))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "source:not_a_page"


def test_pages_about_robots_are_pages(tmp_path: Path) -> None:
    payload = response("HTTP/1.1 200 OK\nContent-Type: text/html", PAGE)
    for url in ("http://a.org/robots.txt/history", "http://a.org/blog/robots.txt-explained", "http://a.org/about/robots.html"):
        assert isinstance(outcomes(tmp_path, record(payload, url=url))[0], Document)


def frames(body: bytes) -> dict[str, bytes]:
    half = len(body) // 2
    zstd = zstandard.ZstdCompressor().compress
    return {
        "gzip": gzip.compress(body[:half]) + gzip.compress(body[half:]),
        "zstd": zstd(body[:half]) + zstd(body[half:]),
        "deflate": zlib.compress(body),
        "br": brotli.compress(body),
    }


BODY = (PAGE * 40).encode()


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "deflate", "br"])
def test_all_members_and_frames_of_a_body_are_read(encoding: str) -> None:
    message = parse_message(response(f"HTTP/1.1 200 OK\nContent-Encoding: {encoding}", frames(BODY)[encoding]))
    assert decode_body(message) == (BODY, [])


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "deflate", "br"])
def test_cut_bodies_are_counted(encoding: str) -> None:
    lines = "".join(f"<p>{number} {number * 7919 % 1000} {hash((number, 3)) % 10**9}</p>" for number in range(20000)).encode()
    cut = frames(lines)[encoding][:-2000]
    body, problems = decode_body(parse_message(response(f"HTTP/1.1 200 OK\nContent-Encoding: {encoding}", cut)))
    assert problems == ["truncated or damaged compressed body"]
    assert lines.startswith(body)
    assert len(body) > len(lines) // 3


@pytest.mark.parametrize("text", ["東京の空は青い。", "村の灯台", "「はい」と言った。"])
def test_undeclared_iso_2022_jp(text: str) -> None:
    body = f"<p>{text}</p>".encode("iso2022_jp")
    for declared in (None, "utf-8", "us-ascii"):
        assert decode_text(body, declared).text == f"<p>{text}</p>"
    assert decode_text(b"<p>\x1b[31mred\x1b[0m</p>", None).charset == "utf-8"


@pytest.mark.parametrize(
    "text", ["Déjà vu à l’été d’Orléans, où l’on goûta des crêpes.", "В чащах юга жил бы цитрус", "村北的灯塔如今是图书馆"]
)
@pytest.mark.parametrize("declared", [None, "iso-8859-1", "windows-1252", "utf-8"])
def test_one_bad_byte_does_not_undo_utf8(text: str, declared: str | None) -> None:
    body = (text * 3).encode()
    half = len(text.encode())
    decoded = decode_text(body[:half] + b"\xff" + body[half:], declared)
    assert decoded.charset == "utf-8"
    assert decoded.text == text + "\ufffd" + text * 2


@pytest.mark.parametrize(
    ("text", "charset"), [("Café à l’heure, “oui” – dit-il", "cp1252"), ("Über die Brücke fährt “er”", "cp1252")]
)
@pytest.mark.parametrize(
    "label", ["iso-8859-1", "iso_8859-1", "l1", "cp819", "latin1", "ISO_8859-1:1987", "windows-1252", " x-cp1252 "]
)
def test_labels_of_latin_1_keep_quotation_marks(text: str, charset: str, label: str) -> None:
    decoded = decode_text(text.encode("cp1252"), label)
    assert (decoded.text, decoded.charset) == (text, charset)


@pytest.mark.parametrize(
    ("label", "codec", "charset"),
    [
        ("gb2312", "gb18030", "gb18030"),
        ("x-gbk", "gb18030", "gb18030"),
        ("csiso58gb231280", "gb18030", "gb18030"),
        ("big5-hkscs", "big5hkscs", "big5hkscs"),
        ("x-sjis", "cp932", "cp932"),
        ("ks_c_5601-1987", "cp949", "cp949"),
    ],
)
def test_labels_of_east_asian_charsets(label: str, codec: str, charset: str) -> None:
    text = "한국의 오래된 등대" if codec == "cp949" else "東京港口"
    decoded = decode_text(text.encode(codec), label)
    assert (decoded.text, decoded.charset) == (text, charset)


@pytest.mark.parametrize(
    "text", ["這條河發源於北方的群山，流經三座小鎮，最後在舊港口附近匯入大海。", "他說這是他們的國家，時間過了就沒有了。"]
)
def test_undeclared_big5_is_not_gbk(text: str) -> None:
    assert decode_text(f"<p>{text * 4}</p>".encode("big5"), None).text == f"<p>{text * 4}</p>"


def test_time_over_wrong_lengths_grows_with_the_file_only(tmp_path: Path) -> None:
    """Each of many records claims 64 MB; each costs no more than itself."""

    def seconds(count: int) -> float:
        wrong = record(b"x" * 300).replace(b"Content-Length: 300", b"Content-Length: 60000000")
        path = tmp_path / f"{count}.warc"
        path.write_bytes(wrong * count)
        started = time.process_time()
        found = list(read_records(Block(str(path), "x")))
        elapsed = time.process_time() - started
        assert sum(isinstance(item, Record) for item in found) == count
        return elapsed

    seconds(100)
    small, large = (min(seconds(count) for _ in range(3)) for count in (2000, 16000))  # a busy machine disturbs single ones
    assert large < 20 * max(small, 0.01)
