"""The quickstart's dumps: read back by other readers than ours, they hold what planted.json says."""

import bz2
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.quickstart import pages as demo_pages
from megagpt.quickstart.dumps import FURNITURE, DemoConfig, Planted, build_demo_dumps
from megagpt.quickstart.pages import Page, gather_pages, is_prose, parse_blocks, word_shingles

MEGABYTES = 0.5


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    directory = tmp_path_factory.mktemp("demo") / "dumps"
    return directory, build_demo_dumps(DemoConfig(directory=directory, text_megabytes=MEGABYTES, num_web_files=2))


def web_records(path: str) -> list[tuple[str, str, bytes, bool]]:
    """(type, URL, payload, block digest is right) of each record that can be read whole."""
    records = []
    for record in ArchiveIterator(path, parse_http=False):
        kind, url = record.headers["WARC-Type"], record.headers.get("WARC-Target-URI", "")
        block = record.reader.read()
        if len(block) < int(record.headers["Content-Length"]):
            continue
        digest = hashlib.sha1(block).digest()
        right = record.headers["WARC-Block-Digest"] == f"sha1:{demo_base32(digest)}"
        body = block.partition(b"\r\n\r\n")[2] if kind == "response" else block
        records.append((kind, url, body, right))
    return records


def demo_base32(data: bytes) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    number = int.from_bytes(data)
    return "".join(alphabet[(number >> shift) & 31] for shift in range(155, -1, -5))


def test_web_records_are_what_was_planted(dumps: tuple[Path, Planted]) -> None:
    _, planted = dumps
    assert len(planted.web_files) == 2
    records = [record for path in planted.web_files for record in web_records(path)]
    assert all(right for *_, right in records)
    kinds = Counter(kind for kind, *_ in records)
    # The last file ends with a whole request and half a response.
    assert kinds == {
        "warcinfo": 2,
        "request": planted.responses,
        "response": planted.responses - planted.cut_off_records,
        "metadata": planted.responses - planted.cut_off_records,
    }
    urls = [url for kind, url, *_ in records if kind == "response"]
    assert len(set(urls)) == len(urls)
    bodies = Counter(body for kind, _, body, _ in records if kind == "response")
    assert sum(count - 1 for count in bodies.values()) == planted.exact_copies > 0


def test_near_copies_are_near(dumps: tuple[Path, Planted]) -> None:
    _, planted = dumps
    records = [record for path in planted.web_files for record in web_records(path)]
    bodies = {url: body.decode("utf-8", "replace") for kind, url, body, _ in records if kind == "response"}
    near = [url for url in bodies if url.startswith("https://archive.example.com/")]
    assert len(near) == planted.near_copies > 0

    def shingles(url: str) -> set[tuple[str, ...]]:
        article = re.sub(r"<[^>]+>", " ", bodies[url].partition("<article>")[2].partition("</article>")[0])
        words = article.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    for url in near:
        ours, original = shingles(url), shingles(url.replace("archive.example.com", "docs.example.org"))
        # One word of 300 and a line of 7: at least (300 - 5) / (300 + 5 + 7) of the shingles stay.
        assert 0.9 < len(ours & original) / len(ours | original) < 1


def test_every_web_page_has_furniture(dumps: tuple[Path, Planted]) -> None:
    _, planted = dumps
    pages = [body for path in planted.web_files for kind, _, body, _ in web_records(path) if kind == "response"]
    furnished = [page for page in pages if all(phrase.encode() in page for phrase in FURNITURE)]
    assert len(pages) - len(furnished) == planted.undecodable_pages == 1


def test_foreign_pages_are_in_their_declared_charset(dumps: tuple[Path, Planted]) -> None:
    _, planted = dumps
    records = [record for path in planted.web_files for record in web_records(path)]
    charsets = {}
    for kind, url, body, _ in records:
        language = re.match(r"https://(\w\w)\.example\.org/", url)
        if kind == "response" and language:
            charset = re.search(rb'charset="([\w-]+)"', body)
            assert charset is not None
            charsets[language[1]] = charset[1].decode()
            assert "\ufffd" not in body.decode(charsets[language[1]])
    assert len(charsets) == planted.other_languages
    assert charsets["ru"] == "windows-1251"


def test_wiki_pages_are_what_was_planted(dumps: tuple[Path, Planted]) -> None:
    _, planted = dumps
    raw = Path(planted.wiki_file).read_bytes()
    decompressor = bz2.BZ2Decompressor()
    decompressor.decompress(raw)
    assert decompressor.unused_data, "one bz2 stream, not several"
    root = ElementTree.fromstring(bz2.decompress(raw))
    space = "{http://www.mediawiki.org/xml/export-0.11/}"
    pages = root.findall(f"{space}page")
    redirects = [page for page in pages if page.find(f"{space}redirect") is not None]
    others = [page for page in pages if page.findtext(f"{space}ns") != "0"]
    assert (len(redirects), len(others)) == (planted.redirects, planted.other_namespaces)
    assert len(pages) == planted.wiki_pages == planted.articles + planted.redirects + planted.other_namespaces
    assert len({page.findtext(f"{space}id") for page in pages}) == len(pages)
    for page in pages:
        text = page.findtext(f"{space}revision/{space}text") or ""
        element = page.find(f"{space}revision/{space}text")
        assert element is not None
        assert int(element.attrib["bytes"]) == len(text.encode())


def test_building_again_uses_what_is_there_and_elsewhere_gives_the_same_bytes(
    dumps: tuple[Path, Planted], tmp_path: Path
) -> None:
    directory, planted = dumps
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert build_demo_dumps(DemoConfig(directory=directory, text_megabytes=MEGABYTES, num_web_files=2)) == planted
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    again = tmp_path / "again"
    build_demo_dumps(DemoConfig(directory=again, text_megabytes=MEGABYTES, num_web_files=2, num_workers=1))
    assert read_json(again / "planted.json")["sha256"] == read_json(directory / "planted.json")["sha256"]


def test_pages_do_not_resemble_each_other() -> None:
    pages = gather_pages(200_000)
    assert len({page.name for page in pages}) == len(pages) > 100
    assert all(is_prose(page) for page in pages)
    sets = [word_shingles(page) for page in pages]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert len(one & other) / len(one | other) <= demo_pages.MAX_SHARED


def test_a_machine_without_documentation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = demo_pages.list_sources()[:5]
    monkeypatch.setattr(demo_pages, "list_sources", lambda: few)
    with pytest.raises(UserError, match=r"text_megabytes=0\.5: the documentation on this machine holds 0\.0 MB only"):
        build_demo_dumps(DemoConfig(directory=tmp_path / "dumps", text_megabytes=0.5))
    assert not (tmp_path / "dumps").exists()


@pytest.mark.parametrize(
    ("docstring", "blocks"),
    [
        ("One\nline.\n\nAnother ``x`` and :func:`~a.b`.", [("paragraph", "One line."), ("paragraph", "Another x and a.b.")]),
        ("Notes\n-----\nText here.", [("heading", "Notes"), ("paragraph", "Text here.")]),
        ("# Title\n\n- one\n- two\n  more", [("heading", "Title"), ("item", "one"), ("item", "two more")]),
        (">>> f(1)\n2", [("code", ">>> f(1)\n2")]),
        ("```\ncode\n\nmore\n```\n\ntext", [("code", "code"), ("code", "more"), ("paragraph", "text")]),
        ("x : int\n    The x.\ny : int\n    The y.", [("item", "x : int: The x."), ("item", "y : int: The y.")]),
        ("Args:\n    a: An a.\n    b: A b.", [("heading", "Args"), ("item", "a: An a."), ("item", "b: A b.")]),
        (".. note::\n   dropped", []),
        ("+---+---+\n| a | b |\n+---+---+", [("code", "+---+---+\n| a | b |\n+---+---+")]),
        ("See `the page <http://x.org>`_ and [here](y).", [("paragraph", "See the page and here.")]),
    ],
)
def test_docstrings_become_blocks(docstring: str, blocks: list[tuple[str, str]]) -> None:
    assert list(parse_blocks(docstring)) == blocks


def test_listings_and_short_pages_are_no_prose() -> None:
    words = "it is a word and " * 12
    assert is_prose(Page("a", (("paragraph", words),)))
    assert not is_prose(Page("b", (("paragraph", words[:-5]),)))
    assert not is_prose(Page("c", (("paragraph", words), ("code", "x = 1\n" * 11))))
    assert not is_prose(Page("d", (("paragraph", "name " * 100),)))
