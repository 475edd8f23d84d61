"""Pages of a wiki's dump as documents: which pages are articles, and the text of each."""

import html
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from megagpt.corpus.extraction.wiki_sites import Site, site_of
from megagpt.corpus.extraction.wikitext import is_redirect, read_wikitext
from megagpt.corpus.readers.mediawiki import Page, read_head, read_pages
from megagpt.corpus.runner.blocks import Block, DroppedText, MalformedRecord, Outcome, Seen
from megagpt.corpus.runner.cpu_limit import CpuLimitExceededError, cpu_limit
from megagpt.documents import Document, Rejected

_NAMESPACE = re.compile(r'<namespace key="(?:6|14|-2)"[^<>]*+>([^<]*+)</namespace>')
_LANGUAGE = re.compile(r'<mediawiki\b[^<>]*?\bxml:lang="([A-Za-z-]{2,20})"')
_DATABASE = re.compile(r"<dbname>([a-z_]{2,20}?)wiki\w{0,20}</dbname>")
_BASE = re.compile(r"<base>([^<]*/)[^</]*+</base>")


def wiki_outcomes(block: Block, source: str, max_page_cpu_seconds: float = 20.0) -> Iterator[Outcome]:
    """Articles of a block as documents; redirects, other namespaces, deleted and empty pages rejected.

    Of several revisions of a page the newest counts. Templates whose text is missing in a sentence are counted by name.
    """
    head = read_head(Path(block.path))
    base = _BASE.search(head)
    site = read_site(head)
    found = 0
    for page in read_pages(block):
        found += 1
        if isinstance(page, MalformedRecord):
            yield page
            continue
        yield Seen("page")
        if page.older_revisions:
            yield Seen("older revision", page.older_revisions)
        url = base[1] + urllib.parse.quote(page.title.replace(" ", "_"), safe="/:(),'!*;@&=$~") if base else None
        meta = {"title": page.title, "page_id": page.page_id, "date": page.date}
        reason = _reason_against(page)
        article = None
        if reason is None:
            try:
                with cpu_limit(max_page_cpu_seconds):
                    article = read_wikitext(page.text, site, page.title)
            except CpuLimitExceededError:
                reason = "source:cpu_limit"
        text = article.text if article else ""
        document = Document(page.where, f"{page.title}\n{text}" if text else "", source, url, meta)
        if article and text:
            yield document
            yield from (DroppedText(name, count) for name, count in article.dropped_templates.items())
        else:
            yield Rejected(document, reason or "source:empty")
    if found == block.start == 0 and head and "<mediawiki" not in head:
        yield MalformedRecord("no MediaWiki dump", f"{Path(block.path).name}: offset 0")


def read_site(head: str) -> Site:
    """The wiki that a dump's first bytes describe: its language, and what it calls its files and categories."""
    language = _LANGUAGE.search(head) or _DATABASE.search(head)
    return site_of(language[1] if language else "", (html.unescape(name) for name in _NAMESPACE.findall(head)))


def _reason_against(page: Page) -> str | None:
    if page.redirects or is_redirect(page.text):
        return "source:redirect"
    if page.namespace != 0:
        return "source:namespace"
    if page.model != "wikitext":
        return "source:model"
    if page.deleted:
        return "source:deleted"
    return None if page.text.strip() else "source:empty"
