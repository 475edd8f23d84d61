"""WARC (0.18 to 1.1) and ARC records from gzip (a member per record, or one for all), zstd and plain files, damaged ones too.

How it works. A file is a sequence of members: a gzip member each, or the whole file when it is plain or zstd. A member is
decompressed as it is read and cut into records by their own lengths. Where something does not fit (bytes that are no header, a
member that does not decompress, a record that ends early, a length that reaches into the next record) a MalformedRecord says
so, and reading resumes at the next certain record: a line that begins like one, or a gzip member whose content does.
So a malformed record loses one record.

A block may start anywhere in a gzip file: reading starts at the first member that begins with a record, which is where the
block before stops. `where` is "<file name>:<offset>", with "+<offset inside>" for later records of a gzip member.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from megagpt.corpus.runner.blocks import Block, MalformedRecord
from megagpt.documents import decompressed

CHUNK_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 16
MAX_RECORD_BYTES = 64 << 20
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_WARC_START = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n?$")
_WARC_INSIDE = re.compile(rb"\r?\nWARC/\d+\.\d+\r?\nWARC-[A-Z]")
_ARC_START = re.compile(
    rb"\A(?P<url>[A-Za-z][A-Za-z0-9+.-]*:.*) (?P<ip>[0-9a-fA-F.:]+|-) (?P<date>\d{8,17}) (?P<mime>[^\s;]+(?:; ?[^\s;]+)?;?)"
    rb"(?P<v2> \S+ \S+ \S+ \d+ \S+)? (?P<length>\d+)\s*$"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `type` is WARC-Type; an ARC capture is a "response", an ARC file's head a "warcinfo".

    `headers` have lower-case names. `is_http` says that `body` begins with an HTTP status line or headers.
    """

    where: str
    type: str
    url: str | None
    date: str | None
    mime: str
    headers: dict[str, str]
    body: bytes
    is_http: bool


def read_records(block: Block) -> Iterator[Record | MalformedRecord]:
    """The records of a block, and a MalformedRecord for each damage met."""
    path = Path(block.path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic[:3] == _GZIP_MAGIC or (path.suffix == ".gz" and magic not in (b"WARC", b"file")):
            yield from _read_gzip(file, path.name, block.start, block.end)
            return
        file.seek(0)
        if magic == _ZSTD_MAGIC or path.suffix == ".zst":
            yield from _read_member(_Member(decompressed(file, ".zst")), path.name, 0, plain=True)
        else:
            yield from _read_member(_Member(iter(lambda: file.read(CHUNK_BYTES), b"")), path.name, 0, plain=True)


def split_gzip(path: Path, block_bytes: int) -> list[tuple[int, int | None]]:
    """Byte ranges of about block_bytes for a file with a gzip member per record; one range for any other file."""
    size = path.stat().st_size
    if size <= block_bytes:
        return [(0, None)]
    with path.open("rb") as file:
        if file.read(3) != _GZIP_MAGIC or _next_start(file, 1, block_bytes) is None:
            return [(0, None)]
    starts = list(range(0, size, block_bytes))
    return [(start, start + block_bytes if start != starts[-1] else None) for start in starts]


class _Member:
    """Decompressed bytes of one member, pulled as needed; `position` is the offset inside it."""

    def __init__(self, chunks: Iterator[bytes], truncated: str = "truncated file") -> None:
        self._chunks, self._buffer, self.position = chunks, bytearray(), 0
        self._truncated = truncated
        self.damage: str | None = None

    def fill(self, count: int) -> int:
        """Have `count` bytes ready if there are as many; returns how many are."""
        while len(self._buffer) < count:
            try:
                piece = next(self._chunks, b"")
            except (zlib.error, zstandard.ZstdError, EOFError) as error:
                self.damage = self._truncated if isinstance(error, EOFError) else "damaged compressed data"
                self._chunks, piece = iter(()), b""
            if not piece:
                break
            self._buffer += piece
        return len(self._buffer)

    def line(self) -> bytes:
        """The next line with its end, cut at MAX_HEADER_BYTES; b"" at the end."""
        wanted = 512
        while True:
            ready = self.fill(wanted)
            end = self._buffer.find(b"\n", 0, min(ready, MAX_HEADER_BYTES))
            if end >= 0:
                return self.take(end + 1)
            if ready < wanted or wanted >= MAX_HEADER_BYTES:
                return self.take(min(ready, MAX_HEADER_BYTES))
            wanted *= 4

    def peek(self, count: int, offset: int = 0) -> bytes:
        """Up to `count` bytes from `offset` on, which stay."""
        self.fill(offset + count)
        return bytes(self._buffer[offset : offset + count])

    def take(self, count: int) -> bytes:
        """The next bytes, fewer than `count` only at the end."""
        self.fill(count)
        piece = bytes(self._buffer[:count])
        del self._buffer[:count]  # cheap: Python moves the start of a bytearray
        self.position += len(piece)
        return piece

    def find(self, pattern: re.Pattern[bytes], count: int) -> int:
        """Where a pattern begins in the next `count` bytes, -1 if it does not."""
        self.fill(count)
        match = pattern.search(self._buffer, 0, count)
        return match.start() if match else -1

    def skip(self, count: int) -> int:
        """Pass over bytes without holding them; returns how many there were."""
        left = count
        while left and (piece := self.take(min(left, CHUNK_BYTES))):
            left -= len(piece)
        return count - left


# ---- members


class _Tape:
    """Compressed bytes of a file from an offset on; bytes that a member did not need are returned for the next."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._ready, self.offset = file, b"", 0

    def move(self, offset: int) -> None:
        self._file.seek(offset)
        self._ready, self.offset = b"", offset

    def read(self) -> bytes:
        data, self._ready = self._ready or self._file.read(CHUNK_BYTES), b""
        self.offset += len(data)
        return data

    def give_back(self, data: bytes) -> None:
        self._ready = data
        self.offset -= len(data)


def _read_gzip(file: IO[bytes], name: str, start: int, end: int | None) -> Iterator[Record | MalformedRecord]:
    tape = _Tape(file)
    offset = start if start == 0 and _is_member(file, 0) else _next_start(file, start, None)
    if offset is None and start == 0 and file.seek(0, 2):
        yield MalformedRecord("no gzip member in the file", f"{name}: offset 0")
    if offset is not None and start == 0 and offset > 0:
        yield MalformedRecord("garbage between gzip members", f"{name}: offset 0")
    tape.move(offset or 0)
    while offset is not None and (end is None or offset < end):
        member = _Member(_gzip_chunks(tape), "truncated gzip member")
        yield from _read_member(member, name, offset, plain=False)
        if member.damage:
            yield MalformedRecord(member.damage, f"{name}: offset {offset}")
            offset = _next_start(file, offset + 1, None)
            tape.move(offset or 0)
            continue
        offset, garbage = _after_member(file, tape)
        if garbage is not None:
            yield MalformedRecord("garbage between gzip members", f"{name}: offset {garbage}")


def _gzip_chunks(tape: _Tape) -> Iterator[bytes]:
    """Decompressed pieces of the member at the tape's position, which is left behind it."""
    decoder = zlib.decompressobj(wbits=31)
    while not decoder.eof:
        data = tape.read()
        if not data:
            raise EOFError
        piece = decoder.decompress(data)
        if decoder.eof:
            tape.give_back(decoder.unused_data)
        if piece:
            yield piece


def _is_member(file: IO[bytes], offset: int) -> bool:
    file.seek(offset)
    return file.read(2) == _GZIP_MAGIC[:2]


def _after_member(file: IO[bytes], tape: _Tape) -> tuple[int | None, int | None]:
    """Where the next member starts (the tape is moved there), and where garbage begins if any lies between; zeros are none."""
    here = tape.offset
    head = tape.read()
    if head[:2] == _GZIP_MAGIC[:2]:
        tape.give_back(head)
        return here, None
    following = _next_start(file, here, None)
    between = head if following is None else head[: following - here]
    tape.move(following or 0)
    return following, here if between.strip(b"\0") else None


def _next_start(file: IO[bytes], offset: int, within: int | None) -> int | None:
    """Offset of the first gzip member at or after `offset` that begins with a record; None if there is none `within` bytes."""
    last = None if within is None else offset + within
    while last is None or offset < last:
        file.seek(offset)
        data = file.read(1 << 20)
        found = data.find(_GZIP_MAGIC)
        while found >= 0:
            if found > len(data) - 1024 and found > 0:
                break
            if _begins_record(data[found : found + 1024]):
                return offset + found
            found = data.find(_GZIP_MAGIC, found + 1)
        if found > 0:
            offset += found
        elif len(data) < 3 or len(data) < (1 << 20):
            return None
        else:
            offset += len(data) - 2
    return None


def _begins_record(data: bytes) -> bool:
    try:
        text = zlib.decompressobj(wbits=31).decompress(data, 4096).lstrip(b"\r\n")
    except zlib.error:
        return False
    return text.startswith(b"WARC/") or _arc_start(text.partition(b"\n")[0]) is not None


# ---- records


def _read_member(member: _Member, name: str, offset: int, *, plain: bool) -> Iterator[Record | MalformedRecord]:
    """Cut a member into records. Its own damage (member.damage) is left to the caller if it is a gzip member."""
    first = True
    while True:
        while head := member.peek(16):
            blank = len(head) - len(head.lstrip(b"\r\n"))
            member.take(blank)
            if blank < len(head):
                break
        where = f"{name}:{offset + member.position}" if plain else f"{name}:{offset}" + ("" if first else f"+{member.position}")
        line = member.line()
        if not line:
            break
        arc = None if line.startswith(b"WARC/") else _arc_start(line)
        if arc is not None:
            yield from _arc_record(member, arc, where)
        elif _WARC_START.match(line):
            yield from _warc_record(member, where)
        else:
            if member.damage is None:
                yield MalformedRecord("garbage between records", _readable(where))
            _to_next_start(member)
        first = False
    if plain and member.damage:
        yield MalformedRecord(member.damage, f"{name}: offset {member.position}")


def _to_next_start(member: _Member) -> None:
    """Pass over lines up to one that begins a record."""
    while head := member.peek(512):
        line = head.partition(b"\n")[0]
        if _WARC_START.match(line + b"\n") or (len(head) > len(line) and _arc_start(line)):
            return
        member.line()


def _warc_record(member: _Member, where: str) -> Iterator[Record | MalformedRecord]:
    headers = _read_headers(member)
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdigit():
        yield MalformedRecord("record without a valid length", _readable(where))
        _to_next_start(member)
        return
    mime = headers.get("content-type", "")
    url = headers.get("warc-target-uri", "").strip("<>") or None
    is_http = mime.lower().startswith("application/http")
    head = (headers.get("warc-type", "").lower(), url, headers.get("warc-date"), mime, headers)
    yield from _with_body(member, int(length), where, head, is_http)


def _arc_record(member: _Member, match: re.Match[bytes], where: str) -> Iterator[Record | MalformedRecord]:
    url = match["url"].decode("utf-8", "replace")
    kind = "warcinfo" if url.startswith("filedesc:") else "response"
    mime = match["mime"].decode("latin-1")
    head = (kind, url, match["date"].decode(), mime, dict[str, str]())
    yield from _with_body(member, int(match["length"]), where, head, url.lower().startswith("http"))


def _with_body(
    member: _Member, length: int, where: str, head: tuple[str, str | None, str | None, str, dict[str, str]], is_http: bool
) -> Iterator[Record | MalformedRecord]:
    if length > MAX_RECORD_BYTES:
        yield MalformedRecord("record longer than 64 MiB", _readable(where))
        _skip_long(member, length)
        return
    ready = member.fill(length + 64)
    inside = -1
    if ready < length or not _ends_here(member, length):
        inside = member.find(_WARC_INSIDE, length + 64)
    if 0 <= inside < length:
        yield MalformedRecord("record length reaches into the next record", _readable(where))
        body = member.take(inside).rstrip(b"\r\n")
    else:
        body = member.take(length)
        if len(body) < length:
            yield MalformedRecord("truncated record", _readable(where))
    yield Record(where, *head, body, is_http)


def _skip_long(member: _Member, length: int) -> None:
    """Pass over a body that is not held, up to the next record if one begins in it: then the length was wrong."""
    while length:
        step = min(length, CHUNK_BYTES)
        inside = member.find(_WARC_INSIDE, step + 64)
        if 0 <= inside < step:
            member.take(inside)
            return
        taken = len(member.take(step))
        if not taken:
            return
        length -= taken


def _ends_here(member: _Member, offset: int) -> bool:
    """Whether empty lines and then a record or the end follow at `offset`."""
    following = member.peek(512, offset).lstrip(b"\r\n")
    line = following.partition(b"\n")[0]
    return not following or _WARC_START.match(line + b"\n") is not None or _arc_start(line) is not None


def _arc_start(line: bytes) -> re.Match[bytes] | None:
    """The fields of an ARC record's line; a long line is none, and matching it could take long."""
    return _ARC_START.match(line) if len(line) <= 4096 else None


def _read_headers(member: _Member) -> dict[str, str]:
    """Header lines up to the empty line; a line that begins with a space continues the one before. The first of a name wins."""
    headers: dict[str, str] = {}
    name = ""
    for line in _header_lines(member):
        text = line.decode("utf-8", "replace")
        if text[0] in " \t" and name:
            headers[name] += " " + text.strip()
            continue
        name, _, value = text.partition(":")
        name = name.strip().lower()
        headers.setdefault(name, value.strip())
    return headers


def _header_lines(member: _Member) -> Iterator[bytes]:
    head = member.peek(2048)
    end = head.find(b"\r\n\r\n")
    if end > 0 and b"\n\n" not in head[:end]:
        member.take(end + 4)
        yield from filter(None, head[:end].split(b"\r\n"))
        return
    for _ in range(1000):
        line = member.line().rstrip(b"\r\n")
        if not line:
            return
        yield line


def _readable(where: str) -> str:
    name, _, offset = where.rpartition(":")
    return f"{name}: offset {offset}"
