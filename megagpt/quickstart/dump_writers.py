"""Writers of the quickstart's dumps: .warc.gz as Common Crawl writes it, and a MediaWiki pages-articles .xml.bz2.

Web: warcinfo, then request, response and metadata of each page, every record its own gzip member. Wiki: multistream, a bz2
stream of 100 pages each. The same pages yield the same bytes.
"""

import base64
import bz2
import gzip
import hashlib
import html
import json
import random
import textwrap
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.files import atomic_path
from megagpt.quickstart.pages import Page

DATE = "2024-03-12T09:00:00Z"


@dataclass(frozen=True, slots=True)
class WebPage:
    """One captured page: its address, its HTTP headers beyond the usual ones, and its body."""

    url: str
    body: bytes
    language: str = "en"
    charset: str = "utf-8"
    content_encoding: str | None = None


# ---- WARC (ISO 28500), as Common Crawl writes it


def write_warc(path: Path, pages: Iterable[WebPage], *, cut_off: bool) -> None:
    """Write request, response and metadata of each page, every record its own gzip member; if asked, end inside a response."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        about = b"software: MegaGPT quickstart\r\nformat: WARC File Format 1.1\r\n"
        file.write(warc_record("warcinfo", path.name, "application/warc-fields", about, {"WARC-Filename": path.name}))
        for page in pages:
            for record in captured(page):
                file.write(record)
        if cut_off:
            noise = random.Random(0).randbytes(8000).hex(" ", 4)
            page = WebPage("https://docs.example.org/last.html", f"<html><body><!-- {noise} --></body></html>".encode())
            request, response, _ = captured(page)
            file.write(request)
            file.write(response[: len(response) // 2])


def captured(page: WebPage) -> tuple[bytes, bytes, bytes]:
    """The request, response and metadata records of one page."""
    host, _, rest = page.url.removeprefix("https://").partition("/")
    request = f"GET /{rest} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: MegaGPT-quickstart\r\nAccept: text/html\r\n\r\n".encode()
    fields = {"Content-Type": f"text/html; charset={page.charset}", "Content-Length": str(len(page.body))}
    if page.content_encoding:
        fields["Content-Encoding"] = page.content_encoding
    head = "HTTP/1.1 200 OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
    seen = {
        "reliable": True,
        "languages": [{"code": page.language, "text-covered": 0.99, "score": 1200.0, "name": page.language}],
    }
    metadata = f"fetchTimeMs: 120\r\ncharset-detected: {page.charset}\r\nlanguages-cld2: {json.dumps(seen)}\r\n".encode()
    target = {"WARC-Target-URI": page.url}
    answer = {"WARC-Concurrent-To": record_id("request", page.url), "WARC-Payload-Digest": digest(page.body)}
    about = {"WARC-Concurrent-To": record_id("response", page.url)}
    return (
        warc_record("request", page.url, "application/http; msgtype=request", request, target),
        warc_record("response", page.url, "application/http; msgtype=response", head.encode() + page.body, target | answer),
        warc_record("metadata", page.url, "application/warc-fields", metadata, target | about),
    )


def warc_record(kind: str, subject: str, content_type: str, block: bytes, fields: dict[str, str]) -> bytes:
    """One record as one gzip member without a time stamp."""
    lines = {
        "WARC-Type": kind,
        "WARC-Date": DATE,
        "WARC-Record-ID": record_id(kind, subject),
        "Content-Length": str(len(block)),
        "Content-Type": content_type,
        "WARC-Block-Digest": digest(block),
        **fields,
    }
    head = "WARC/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return gzip.compress(head.encode() + b"\r\n" + block + b"\r\n\r\n", mtime=0)


def record_id(kind: str, subject: str) -> str:
    """A record's name, the same in every run."""
    return f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{kind} {subject}')}>"


def digest(data: bytes) -> str:
    """sha1 in base 32, the form crawlers write."""
    return "sha1:" + base64.b32encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()


# ---- MediaWiki export (version 0.11)


def write_wiki(path: Path, pages: Sequence[Page], *, num_redirects: int, num_other_namespaces: int) -> None:
    """Write articles, redirects and pages of another namespace: a bz2 stream of 100 pages each, as the real dumps have."""
    entries = [wiki_page(title_of(page), 0, wikitext(page, pages[i - 1])) for i, page in enumerate(pages)]
    for page in pages[:num_redirects]:
        entries.append(wiki_page(page.name, 0, f"#REDIRECT [[{title_of(page)}]]", redirect=title_of(page)))
    for page in pages[:num_other_namespaces]:
        entries.append(wiki_page(f"Talk:{title_of(page)}", 1, "Should this page have more examples? ~~~~"))
    random.Random(0).shuffle(entries)
    entries = [entry.replace("<id></id>", f"<id>{number}</id>", 1) for number, entry in enumerate(entries, start=1)]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(bz2.compress(_WIKI_HEAD.encode()))
        for start in range(0, len(entries), 100):
            file.write(bz2.compress("".join(entries[start : start + 100]).encode()))
        file.write(bz2.compress(b"</mediawiki>\n"))


def title_of(page: Page) -> str:
    """An article's title: "Numpy linalg norm" for numpy.linalg.norm (underscores in titles are spaces)."""
    words = page.name.replace(".", " ").replace("_", " ").split()
    return " ".join([words[0].capitalize(), *words[1:]])


def wiki_page(title: str, namespace: int, text: str, redirect: str | None = None) -> str:
    """One <page> element; its id is filled in when the order is known."""
    target = f'\n    <redirect title="{html.escape(redirect)}" />' if redirect else ""
    size = len(text.encode())
    return f"""  <page>
    <title>{html.escape(title)}</title>
    <ns>{namespace}</ns>
    <id></id>{target}
    <revision>
      <id>{size}</id>
      <timestamp>{DATE}</timestamp>
      <contributor><username>Quickstart</username><id>1</id></contributor>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" xml:space="preserve">{html.escape(text)}</text>
    </revision>
  </page>
"""


def wikitext(page: Page, other: Page) -> str:
    """A page as an article: infobox, bold title, sections, a list of links, a reference and a category."""
    forms: dict[str, Callable[[str], str]] = {
        "heading": lambda text: f"== {text} ==",
        "paragraph": html.escape,
        "item": lambda text: f"* {html.escape(text)}",
        "code": lambda text: f'<syntaxhighlight lang="python">\n{text}\n</syntaxhighlight>',
    }
    # Brackets and braces would be read as links and templates; articles say them in words, so these blocks stay out.
    blocks = [(kind, text) for kind, text in page.blocks if kind == "code" or not set("[]{}|=*'") & set(text)]
    body = "\n\n".join(forms[kind](text) for kind, text in blocks).replace("\n\n* ", "\n* ")
    return (
        textwrap.dedent(f"""\
        {{{{Short description|Part of the documentation}}}}
        {{{{Infobox software
        | name = {title_of(page)}
        | licence = free
        }}}}
        '''{title_of(page)}''' is described in the [[{title_of(other)}|documentation]].<ref>
        {{{{cite web|title=Manual|year=2024}}}}</ref>

        """)
        + body
        + f"\n\n== See also ==\n* [[{title_of(other)}]]\n\n== References ==\n{{{{reflist}}}}\n\n[[Category:Documentation]]\n"
    )


_WIKI_HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Docwiki</sitename>
    <dbname>docwiki</dbname>
    <base>https://wiki.example.org/wiki/Main_Page</base>
    <generator>MegaGPT quickstart</generator>
    <case>first-letter</case>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Talk</namespace>
    </namespaces>
  </siteinfo>
"""
