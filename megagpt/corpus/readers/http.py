"""HTTP messages as crawlers stored them: headers, transfer and content encodings, charset.

Crawlers often keep the server's headers over a body they have already decoded, so every encoding is tried and, where the body
shows that it is not there, left alone. What was wrong is returned as a list of short kinds, for the caller to count.
"""

import codecs
import re
import zlib
from dataclasses import dataclass

MAX_BODY_BYTES = 64 << 20

_META_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)\b[^>]{0,400}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.I
)
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_WHATWG = {
    "ascii": "cp1252",
    "us-ascii": "cp1252",
    "iso-8859-1": "cp1252",
    "iso8859-1": "cp1252",
    "latin1": "cp1252",
    "latin-1": "cp1252",
    "iso-8859-9": "cp1254",
    "iso-8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gb_2312-80": "gb18030",
    "gbk": "gb18030",
    "x-gbk": "gb18030",
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "x-sjis": "cp932",
    "sjis": "cp932",
    "windows-31j": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "big5": "big5hkscs",
    "x-big5": "big5hkscs",
    "windows-874": "cp874",
    "utf-16": "utf-16-le",
    "unicode": "utf-16-le",
    "x-mac-cyrillic": "mac_cyrillic",
    "macintosh": "mac_roman",
}
_CHARSETS = re.compile(
    r"(utf_?8(_sig)?|utf_16(_[bl]e)?|utf_32(_[bl]e)?|cp\d+|iso8859_\d+|koi8_[rut]|gb\w+|big5\w*|euc_\w+|shift_jis\w*|iso2022_\w+"
    r"|johab|mac_\w+|hz|tis_620|ptcp154|kz1048|ascii)"
)


@dataclass(frozen=True, slots=True)
class Message:
    """An HTTP response: status (None if the first line is none), headers with lower-case names, body as stored."""

    status: int | None
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text of a body: the charset used (Python's name), and the share of characters that could not be read."""

    text: str
    charset: str
    unreadable: float
    problems: tuple[str, ...]


def parse_message(raw: bytes) -> Message:
    """Split a stored response into status, headers and body. A block without a status line is all body."""
    if not raw[:5].upper().startswith(b"HTTP/") and raw[:4] != b"ICY ":
        return Message(None, {}, raw)
    end = re.search(rb"\r?\n\r?\n", raw)
    head, body = (raw, b"") if end is None else (raw[: end.start()], raw[end.end() :])
    first, *lines = head.decode("latin-1").splitlines()
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    status = re.match(r"\S+\s+(\d{3})", first)
    return Message(int(status[1]) if status else None, headers, body)


def decode_body(message: Message) -> tuple[bytes, list[str]]:
    """Undo chunked transfer and content encodings as far as the body really has them; returns what was wrong beside it."""
    body, problems = message.body, list[str]()
    if "chunked" in message.headers.get("transfer-encoding", "").lower():
        body, problem = _dechunk(body)
        problems += [problem] if problem else []
    encodings = re.split(r"[,\s]+", message.headers.get("content-encoding", "").lower().strip())
    for encoding in reversed([name for name in encodings if name not in ("", "identity", "none")]):
        body, problem = _decompress(body, encoding)
        problems += [problem] if problem else []
    return body, problems


def decode_text(body: bytes, declared: str | None) -> Decoded:
    """Bytes to text by the BOM, the declared charset, the page's meta element, else detection.

    A BOM wins over the header, as browsers have it. Text that is valid UTF-8 with multi-byte characters is UTF-8 whatever was
    declared: the other way round it hardly ever happens. Bytes that the charset cannot hold become U+FFFD.
    """
    problems: list[str] = []
    for bom, charset in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(bom):
            return _decoded(body[len(bom) :], charset, problems)
    meta = _META_CHARSET.search(body[:4096])
    names = [declared, meta[1].decode("ascii") if meta else None]
    for name in names:
        charset = _charset(name)
        if name and charset is None:
            problems.append("unknown charset")
        if charset is None or (charset.startswith("utf-16") and b"\0" not in body[:512]):
            continue
        if charset != "utf-8" and _is_utf8(body):
            return _decoded(body, "utf-8", problems)
        return _decoded(body, charset, problems)
    if _is_utf8(body) or body.isascii():
        return _decoded(body, "utf-8", problems)
    return _decoded(body, _detect(body), problems)


def charset_of(content_type: str) -> str | None:
    """The charset parameter of a Content-Type."""
    match = re.search(r"charset\s*+=\s*+[\"']?\s*+([^\s\"';,]++)", content_type, re.I)
    return match[1] if match else None


def _charset(name: str | None) -> str | None:
    """Python's codec for a label of the web, None if there is none. Only charsets: Python has other codecs too."""
    if not name:
        return None
    name = name.strip().lower()
    try:
        found = codecs.lookup(_WHATWG.get(name, name)).name.replace("-", "_")
    except (LookupError, ValueError):
        return None
    if not _CHARSETS.fullmatch(found):
        return None
    return "utf-8" if found in ("utf_8", "utf_8_sig") else found.replace("utf_16_", "utf-16-")


def _is_utf8(body: bytes) -> bool:
    """Whether it has multi-byte characters and all of it is UTF-8 (a cut last character is allowed)."""
    if body.isascii() or b"\x1b$" in body[:4096]:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        return False
    return True


def _detect(body: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    return _charset(detect_encoding(body)) or "utf-8"


def _decoded(body: bytes, charset: str, problems: list[str]) -> Decoded:
    text = body.decode(charset, "replace")
    num_replaced = text.count("\ufffd")
    if num_replaced:
        problems.append("invalid UTF-8" if charset == "utf-8" else "bytes that the charset cannot hold")
    num_controls = 0
    if charset != "utf-8" or _holds_controls(body):
        num_controls = len(_CONTROLS.findall(text))
    if num_controls:
        text = _CONTROLS.sub(" ", text)
    return Decoded(text, charset, (num_replaced + num_controls) / max(1, len(text)), tuple(problems))


_CONTROLS = re.compile(r"[\0-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_BYTES = bytes([*range(9), 11, *range(14, 32), 127])
_UTF8_CONTROLS = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")


def _holds_controls(body: bytes) -> bool:
    """Whether UTF-8 holds what _CONTROLS matches, told from its bytes: many times as fast."""
    return len(body.translate(None, _CONTROL_BYTES)) < len(body) or _UTF8_CONTROLS.search(body) is not None


def _dechunk(body: bytes) -> tuple[bytes, str | None]:
    """The payload of a chunked body, or the body itself if it does not begin with a chunk."""
    pieces: list[bytes] = []
    position = 0
    while match := _CHUNK_SIZE.match(body, position):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(pieces), None
        piece = body[match.end() : match.end() + size]
        position = match.end() + size
        following = body[position : position + 2]
        if not pieces and len(piece) == size and following and following[:1] not in b"\r\n":
            return body, "wrong Transfer-Encoding: the body is not chunked"
        pieces.append(piece)
        if len(piece) < size:
            break
        position += 2 if following == b"\r\n" else 1
    if not pieces:
        return body, "wrong Transfer-Encoding: the body is not chunked" if body else None
    return b"".join(pieces), "truncated chunked body"


def _decompress(body: bytes, encoding: str) -> tuple[bytes, str | None]:
    wrong = f"wrong Content-Encoding: the body is not {encoding}"
    if not body:
        return body, None
    match encoding:
        case "gzip" | "x-gzip":
            return _inflate(body, 31) if body[:2] == b"\x1f\x8b" else (body, wrong)
        case "deflate":
            plain, problem = _inflate(body, 15)
            if plain is body:
                plain, problem = _inflate(body, -15)
            return (body, wrong) if plain is body else (plain, problem)
        case "br":
            return _unbrotli(body, wrong)
        case "zstd":
            return _unzstd(body, wrong)
    return body, "unknown Content-Encoding"


def _inflate(body: bytes, wbits: int) -> tuple[bytes, str | None]:
    """Decompress as far as it goes; the body itself if nothing comes out."""
    decoder = zlib.decompressobj(wbits)
    pieces, size = [], 0
    try:
        for start in range(0, len(body), 4096):
            pieces.append(decoder.decompress(body[start : start + 4096], MAX_BODY_BYTES))
            size += len(pieces[-1])
            if decoder.eof:
                return b"".join(pieces), None
            if size > MAX_BODY_BYTES:
                return b"".join(pieces)[:MAX_BODY_BYTES], "body longer than 64 MiB"
    except zlib.error:
        pass
    plain = b"".join(pieces)
    return (plain, "truncated or damaged compressed body") if plain else (body, "damaged compressed body")


def _unbrotli(body: bytes, wrong: str) -> tuple[bytes, str | None]:
    import brotli

    if body.lstrip()[:1] == b"<":
        return body, wrong
    decoder, pieces, size = brotli.Decompressor(), [], 0
    try:
        for start in range(0, len(body), 4096):
            pieces.append(decoder.process(body[start : start + 4096], output_buffer_limit=MAX_BODY_BYTES))
            size += len(pieces[-1])
            if size >= MAX_BODY_BYTES:
                return b"".join(pieces)[:MAX_BODY_BYTES], "body longer than 64 MiB"
        return (b"".join(pieces), None) if decoder.is_finished() else (body, wrong)
    except brotli.error:
        return body, wrong


def _unzstd(body: bytes, wrong: str) -> tuple[bytes, str | None]:
    import zstandard

    try:
        return zstandard.ZstdDecompressor().stream_reader(body).read(MAX_BODY_BYTES), None
    except zstandard.ZstdError:
        return body, wrong
