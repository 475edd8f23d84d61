"""From dumps to documents: the first stage, which ties the readers of dumps to the extractors of text."""

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.html import main_text, parse_page, prose
from megagpt.corpus.extraction.wiki_pages import wiki_outcomes
from megagpt.corpus.readers.http import Decoded, Message, charset_of, decode_body, decode_text, parse_message
from megagpt.corpus.readers.inputs import format_of, input_blocks, list_inputs, local_copy
from megagpt.corpus.readers.records import datasets_outcomes, jsonl_outcomes, parquet_outcomes, text_outcomes
from megagpt.corpus.readers.warc import Record, read_records
from megagpt.corpus.runner.blocks import Block, MalformedRecord, Outcome, Seen
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.cpu_limit import CpuLimitExceededError, cpu_limit
from megagpt.corpus.runner.run_stage import run_stage
from megagpt.corpus.runner.summary import StageSummary
from megagpt.corpus.text.fasttext_models import bundled_language_model, load_language_model
from megagpt.documents import Document, JsonValue, Rejected
from megagpt.settings_record import MadeWith, fingerprint

HTML, PLAIN = frozenset(("text/html", "application/xhtml+xml")), frozenset(("text/plain",))


MAX_UNREADABLE = 0.05


_SAY_NOTHING = frozenset(
    ("application/octet-stream", "binary/octet-stream", "application/x-download", "unknown/unknown", "unknown", "*/*")
)


_NO_PAGE = re.compile(
    r"^(?!https?:|ftps?:|file:|gopher:|gemini:)[a-z][a-z0-9+.\-]*:|^https?://[^/?#]*/(?:robots|ads|app-ads|humans|security|"
    r"\.well-known/security)\.txt(?:[?#]|$)|\.(?:appcache|webmanifest)(?:[?#]|$)",
    re.IGNORECASE,
)
"""Records that crawlers keep beside pages: wget's logs and arguments (metadata:), DNS answers, robots.txt, manifests."""


FORMAT = 2
"""Of the stage; it grows when the same settings give other results, or files of another form."""


def extract_documents(config: ExtractConfig, output_dir: Path, execution: Execution) -> StageSummary:
    """Read all inputs and write their documents to output_dir. Raises UserError before any work if an input is missing."""
    blocks = input_blocks(list_inputs(config.inputs, config.inputs_root), config.format, execution.block_bytes)
    settings = config.model_copy(update={"inputs": (), "inputs_root": ""})
    process = functools.partial(read_outcomes, config=config)
    made_with = MadeWith(fingerprint(settings), "extract", settings, format=FORMAT)
    return run_stage("extract", blocks, output_dir, process, made_with=made_with, execution=execution)


def read_outcomes(block: Block, *, config: ExtractConfig) -> Iterator[Outcome]:
    """The outcomes of one block of any input."""
    kind = format_of(block.path, config.format)
    if kind == "datasets":
        yield from datasets_outcomes(block, config.source, config.text_field, config.split)
        return
    with local_copy(block.path) as path:
        block = replace(block, path=path)
        match kind:
            case "web":
                yield from web_outcomes(block, config)
            case "wikipedia":
                yield from wiki_outcomes(block, config.source, config.max_page_cpu_seconds)
            case "jsonl":
                yield from jsonl_outcomes(block, config.source, config.text_field)
            case "text":
                yield from text_outcomes(block, config.source, config.text_unit)
            case "parquet":
                yield from parquet_outcomes(block, config.source, config.text_field)
            case _:
                assert_never(kind)


def web_outcomes(block: Block, config: ExtractConfig) -> Iterator[Outcome]:
    """Pages of WARC, ARC and WET records as documents; other types of content, errors and empty pages rejected."""
    for record in read_records(block):
        if isinstance(record, MalformedRecord):
            yield record
            continue
        yield Seen(record.type or "unknown")
        if record.type in ("response", "resource"):
            yield from _page_outcomes(record, config)
        elif record.type == "conversion":
            yield from _conversion_outcomes(record, config)


def _page_outcomes(record: Record, config: ExtractConfig) -> Iterator[Outcome]:
    message = parse_message(record.body) if record.is_http else Message(None, {}, record.body)
    content_type = message.headers.get("content-type") or ("" if record.mime.startswith("application/http") else record.mime)
    empty = Document(record.where, "", config.source, record.url, {"date": record.date})
    if message.status is not None and not 200 <= message.status < 300:
        yield Rejected(empty, "source:status")
        return
    if record.url and _NO_PAGE.search(record.url):
        yield Rejected(empty, "source:not_a_page")
        return
    mime = _mime(content_type, record, message.body)
    if mime not in HTML | PLAIN:
        yield Rejected(empty, "source:mime")
        return
    body, problems = decode_body(message)
    decoded = decode_text(body, charset_of(content_type))
    yield from (MalformedRecord(problem, _readable(record.where)) for problem in (*problems, *decoded.problems))
    if not body.strip():
        yield Rejected(empty, "source:empty")
    elif decoded.unreadable > MAX_UNREADABLE:
        yield Rejected(empty, "source:undecodable")
    else:
        yield _text_outcome(empty, decoded, mime, config)


def _text_outcome(empty: Document, decoded: Decoded, mime: str, config: ExtractConfig) -> Outcome:
    """The page's text as a document. An extractor that fails on a page rejects it with the error's name and ends no run."""
    language: dict[str, JsonValue] | None = None
    text = title = ""
    try:
        with cpu_limit(config.max_page_cpu_seconds):
            if mime in PLAIN:
                text = decoded.text.strip()
            else:
                text, title, language = _page_text(decoded.text, empty.url, config)
    except CpuLimitExceededError:
        return Rejected(empty, "source:cpu_limit")
    except Exception as error:  # third-party parsers on hostile input
        return Rejected(empty, f"source:extractor_failed_{type(error).__name__}")
    meta = {**empty.meta, "charset": decoded.charset, **({"title": title} if title else {})}
    document = replace(empty, text=text, meta={**meta, **(language or {})})
    if language:
        return Rejected(document, "source:language")
    return document if text else Rejected(document, "source:no_text")


def _page_text(page: str, url: str | None, config: ExtractConfig) -> tuple[str, str, dict[str, JsonValue] | None]:
    """(main text, title, language) of an HTML page; language and score only for a page that is surely in an unwanted one."""
    parsed = parse_page(page, url) if config.languages or config.extractor == "fast" else None
    if parsed and config.languages and (sample := prose(parsed)):
        label, score = load_language_model(bundled_language_model())(sample)
        if label not in config.languages and score >= config.min_other_language_score:
            return sample, parsed.title, {"language": label, "language_score": round(score, 4)}
    if config.extractor == "fast" and parsed:
        extracted = main_text(parsed, markup=config.markup, comments=config.comments)
        return extracted.text, extracted.title, None
    import trafilatura

    kind = "markdown" if config.markup == "markdown" else "txt"
    return trafilatura.extract(page, include_comments=config.comments == "keep", output_format=kind) or "", "", None


def _conversion_outcomes(record: Record, config: ExtractConfig) -> Iterator[Outcome]:
    """Text that the crawl's publisher extracted (WET)."""
    decoded = decode_text(record.body, "utf-8")
    yield from (MalformedRecord(problem, _readable(record.where)) for problem in decoded.problems)
    document = Document(record.where, decoded.text.strip(), config.source, record.url, {"date": record.date})
    yield document if document.text else Rejected(document, "source:empty")


def _mime(content_type: str, record: Record, body: bytes) -> str:
    """Type of a page: the first declared one (a header may list several) that is text, else what the crawler identified.

    Where neither says anything, it is what the body begins like.
    """
    declared = [part.partition(";")[0].strip().lower() for part in content_type.split(",")]
    identified = record.headers.get("warc-identified-payload-type", "").partition(";")[0].strip().lower()
    found = next((mime for mime in (*declared, identified) if mime in HTML | PLAIN), None)
    if found:
        return found
    return _guess_mime(body) if not declared[0] or declared[0] in _SAY_NOTHING else declared[0]


def _guess_mime(body: bytes) -> str:
    head = body[:1024].lstrip().lower()
    return "text/html" if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head else ""


def _readable(where: str) -> str:
    name, _, offset = where.rpartition(":")
    return f"{name}: offset {offset}"
