"""Inputs of bench/data/stages.py: real web pages and pages of Debian's documentation packages, packed as WARC files.

    python -m bench.data.pages DATA_FOLDER OUTPUT_FOLDER

DATA_FOLDER holds warc/ and extract/ (web crawls; pages of extraction benchmarks). Packages come from Debian's archive through
`apt-get download` and are unpacked, not installed. Same inputs, same files.
"""

import gzip
import hashlib
import io
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CRAWLS = (
    "iah-blackbook.warc.gz",
    "archiveit-2698.warc.gz",
    "dolma-sample-0000.warc.gz",
    "cc-main-2020-34.warc.gz",
    "clueweb-quirk.warc.gz",
    "cc-2008-1213893279526_0.arc",
)
PACKAGES = ("python3.11-doc", "postgresql-doc-15", "debian-handbook", "installation-guide-amd64", "debian-reference-de")
NUM_FILES = 2
Page = tuple[str, bytes, str]
"""URL, body, content type."""


def make_warcs(data_folder: Path, packages: Path, folder: Path, *, num_pages: int) -> Path:
    """Write NUM_FILES WARC files of all web pages and as many documentation pages as are missing to `num_pages` to `folder`.

    A folder that is there already is taken as it is. Raises SystemExit if there are not that many pages.
    """
    if folder.is_dir():
        return folder
    pages = list(web_pages(data_folder))
    documentation = sorted(documentation_pages(packages / "packages"), key=_hash)
    pages = sorted([*pages, *documentation[: num_pages - len(pages)]][:num_pages], key=_hash)
    if len(pages) < num_pages:
        raise SystemExit(f"bench/data/pages.py: {len(pages)} pages are there, {num_pages} are asked for")
    unfinished = folder.with_name(f"{folder.name}.tmp")
    for number in range(NUM_FILES):
        write_warc(unfinished / f"pages-{number}.warc.gz", pages[number::NUM_FILES])
    unfinished.rename(folder)
    return folder


def write_warc(path: Path, pages: Iterable[Page]) -> None:
    """Write pages to one .warc.gz, a gzip member per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(_records(page) for page in pages))


def web_pages(data_folder: Path) -> Iterator[Page]:
    """HTML pages of real crawls, and of the two extraction benchmarks."""
    from megagpt.corpus.readers.http import decode_body, parse_message
    from megagpt.corpus.readers.warc import Record, read_records
    from megagpt.corpus.runner.blocks import Block

    for name in CRAWLS:
        for record in read_records(Block(str(data_folder / "warc" / name), name)):
            if not isinstance(record, Record) or record.type != "response":
                continue
            message = parse_message(record.body) if record.is_http else None
            content_type = message.headers.get("content-type", "") if message else record.mime
            if message and message.status == 200 and content_type.startswith("text/html"):
                body, _ = decode_body(message)
                yield record.url or "", body, content_type
    for path in sorted((data_folder / "extract").glob("*/html/*.gz")):
        yield f"http://{path.parent.parent.name}.example/{path.stem}", gzip.decompress(path.read_bytes()), "text/html"


def documentation_pages(folder: Path) -> Iterator[Page]:
    """HTML pages of PACKAGES, without pure indices."""
    for package in PACKAGES:
        root = folder / package
        if not root.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
            archive = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, folder / f"{package}.tmp"], check=True)
            (folder / f"{package}.tmp").rename(root)
        for path in sorted(root.rglob("*")):
            if path.is_symlink() or not path.is_file() or not path.name.endswith((".html", ".html.gz")):
                continue
            body = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            if len(body) > 2000 and "genindex" not in path.name:
                yield f"http://{package}.example/{path.relative_to(root)}", body, "text/html"


def _records(page: Page) -> bytes:
    """Request, response and metadata record of a page, a gzip member each, as Common Crawl writes them."""
    url, body, content_type = page
    name = hashlib.sha256(url.encode() + body).hexdigest()
    response = (
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
    )
    return b"".join(
        _record(kind, url, name, payload, mime)
        for kind, payload, mime in (
            ("request", f"GET {url} HTTP/1.1\r\nAccept: */*\r\n\r\n".encode(), "application/http; msgtype=request"),
            ("response", response, "application/http; msgtype=response"),
            ("metadata", b"fetchTimeMs: 100\r\n", "application/warc-fields"),
        )
    )


def _record(kind: str, url: str, name: str, payload: bytes, mime: str) -> bytes:
    number = f"{name[:8]}-{name[8:12]}-4{name[13:16]}-8{name[17:20]}-{name[20:32]}"
    if kind != "response":
        number = f"{number[:-1]}{'a' if kind == 'request' else 'b'}"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"Content-Length: {len(payload)}\r\nContent-Type: {mime}\r\nWARC-Target-URI: {url}\r\n"
    ) + ("WARC-Identified-Payload-Type: text/html\r\n" if kind == "response" else "")
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as member:
        member.write(head.encode() + b"\r\n" + payload + b"\r\n\r\n")
    return out.getvalue()


def _hash(page: Page) -> str:
    return hashlib.sha256(page[0].encode() + page[1]).hexdigest()


if __name__ == "__main__":
    print(make_warcs(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]) / "3000" / "warcs", num_pages=3000))
