"""The quickstart's dumps: the pages of pages.py as a web crawl and an encyclopaedia, with known faults planted.

planted.json says how many of each fault
went in, so that what the stages find can be compared. The same environment yields the same bytes.
"""

import hashlib
import html
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.files import read_json, sha256_file, write_json
from megagpt.quickstart.dump_writers import WebPage, write_warc, write_wiki
from megagpt.quickstart.pages import BlockKind, Page, gather_pages
from megagpt.quickstart.texts import OTHER_LANGUAGES

MAX_COPIES = 40
MIN_COPIED_WORDS = 300
NUM_REDIRECTS = 30
NUM_OTHER_NAMESPACES = 10
FURNITURE = (
    "All documentation in one place",
    "Was this page helpful?",
    "We use cookies to keep you signed in",
    "Terms of service",
    "Report a problem with this page",
)
"""Phrases of the navigation around every web page; none of them may be left in an extracted text."""


class DemoConfig(Config):
    """How large the quickstart's dumps are, and where they are written."""

    directory: Path = Path("runs/quickstart/dumps")
    """Where the dumps and planted.json are written."""
    text_megabytes: float = Field(default=6.0, ge=0.5, le=100)
    """Text to gather from the documentation on this machine, before the planted pages, in millions of bytes."""
    num_web_files: int = Field(default=4, ge=1, le=64)
    """WARC files to spread the web pages over."""
    num_workers: int = Field(default=2, ge=1)
    """Processes that parse documentation."""


@dataclass(frozen=True, slots=True)
class Planted:
    """What build_demo_dumps wrote: the files, and how many of each kind went in. A later stage must find the same numbers."""

    web_files: tuple[str, ...]
    wiki_file: str
    responses: int
    articles: int
    wiki_pages: int
    redirects: int
    other_namespaces: int
    exact_copies: int
    near_copies: int
    other_languages: int
    undecodable_pages: int
    cut_off_records: int


def build_demo_dumps(config: DemoConfig) -> Planted:
    """Write the dumps below config.directory and return what is in them; a finished directory is used as it is.

    Raises UserError if this machine has too little documentation, or the directory cannot be written.
    """
    marker = config.directory / "planted.json"
    if marker.is_file():
        found = read_json(marker)
        if found["config"] == config.model_dump(mode="json"):
            return Planted(**{**found["planted"], "web_files": tuple(found["planted"]["web_files"])})
    num_bytes = round(config.text_megabytes * 1e6)
    pages = gather_pages(num_bytes, num_workers=config.num_workers)
    size = sum(len(text.encode()) for page in pages for _, text in page.blocks)
    if size < num_bytes / 2:
        raise UserError(
            f"text_megabytes={config.text_megabytes}: the documentation on this machine holds {size / 1e6:.1f} MB only: "
            "ask for less, or give the quickstart your own dumps (warc=PATH, wiki=PATH)"
        )
    shutil.rmtree(config.directory, ignore_errors=True)
    num_articles = len(pages) // 4
    articles, documented = pages[:num_articles], pages[num_articles:]
    web_pages, counts = plant(documented)
    per_file = -(-len(web_pages) // config.num_web_files)
    web_files = []
    for number in range(config.num_web_files):
        path = config.directory / f"web-{number:05d}.warc.gz"
        last = number == config.num_web_files - 1
        write_warc(path, web_pages[number * per_file : (number + 1) * per_file], cut_off=last)
        web_files.append(str(path))
    wiki_file = config.directory / "docwiki-pages-articles-multistream.xml.bz2"
    write_wiki(wiki_file, articles, num_redirects=NUM_REDIRECTS, num_other_namespaces=NUM_OTHER_NAMESPACES)
    planted = Planted(
        web_files=tuple(web_files),
        wiki_file=str(wiki_file),
        responses=len(web_pages) + 1,
        articles=len(articles),
        wiki_pages=len(articles) + NUM_REDIRECTS + NUM_OTHER_NAMESPACES,
        redirects=NUM_REDIRECTS,
        other_namespaces=NUM_OTHER_NAMESPACES,
        cut_off_records=1,
        **counts,
    )
    digests = {Path(name).name: sha256_file(Path(name)) for name in (*web_files, str(wiki_file))}
    write_json(marker, {"config": config.model_dump(mode="json"), "planted": asdict(planted), "sha256": digests})
    return planted


# ---- web pages and what is planted among them


def plant(pages: Sequence[Page]) -> tuple[list[WebPage], dict[str, int]]:
    """Render pages as HTML, add the copies and faults, shuffle. Returns the web pages and the number of each kind."""
    generator = random.Random(0)
    chapters, pages = join_chapters(pages)
    if len(chapters) < 2:
        raise UserError("text_megabytes: too few pages are long and plain enough to be copied; set it higher")
    num_copies = min(len(chapters) // 2, MAX_COPIES)
    pages = [*pages, *chapters]
    plain = [WebPage(address(page), render_html(page, neighbours(pages, i)).encode()) for i, page in enumerate(pages)]
    bodies = {page.url: page.body for page in plain}
    exact = [WebPage(address(page, "mirror.example.net"), bodies[address(page)]) for page in chapters[:num_copies]]
    near = [
        WebPage(address(page, "archive.example.com"), render_html(revise(page, generator), neighbours(pages, 7)).encode())
        for page in chapters[num_copies : 2 * num_copies]
    ]
    other = [foreign_page(*row, linked=neighbours(pages, 3)) for row in OTHER_LANGUAGES]
    # A body declared as compressed that is noise: nothing can be decoded from it.
    broken = WebPage("https://docs.example.org/broken.html", generator.randbytes(4000), content_encoding="gzip")
    web_pages = [*plain, *exact, *near, *other, broken]
    generator.shuffle(web_pages)
    counts = {"exact_copies": len(exact), "near_copies": len(near), "other_languages": len(other), "undecodable_pages": 1}
    return web_pages, counts


def join_chapters(pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
    """Join plain pages into long ones, which can be copied: their copies must live until deduplication, past any filter.

    Returns the joined pages and the pages that are left.
    """
    chapters: list[Page] = []
    blocks: list[tuple[BlockKind, str]] = []
    used, group, said = set(), [], set()
    for page in pages:
        texts = {text for _, text in page.blocks}
        if len(chapters) == 2 * MAX_COPIES or not is_clean(page) or texts & said:
            continue
        group.append(page)
        said |= texts
        blocks += page.blocks
        if sum(len(text.split()) for _, text in blocks) >= MIN_COPIED_WORDS:
            chapters.append(Page(f"guide.{group[0].name}", tuple(blocks)))
            used.update(page.name for page in group)
            group, blocks = [], []
    return chapters, [page for page in pages if page.name not in used]


def is_clean(page: Page) -> bool:
    """Running text without anything that a usual quality filter objects to."""
    text = "\n".join(text for _, text in page.blocks)
    words = text.lower().split()
    grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    sentences = [line for line in page.paragraphs if line.endswith((".", "?", "!")) and len(line.split()) > 8]
    return (
        len(sentences) >= 2
        and sum(len(line.split()) for line in sentences) >= 0.95 * len(words)
        and len(grams) > 0.95 * (len(words) - 2)
        and not set("{}<>|") & set(text)
        and "javascript" not in text.lower()
        and sum(word.strip(".,;:()'\"-").isalpha() for word in words) > 0.9 * len(words)
    )


def foreign_page(language: str, title: str, paragraphs: tuple[str, ...], *, linked: Sequence[Page]) -> WebPage:
    """A page in another language, some of them in the character sets of their region."""
    page = Page(title, tuple(("paragraph", text) for text in paragraphs))
    charset = {"ru": "windows-1251", "de": "iso-8859-1"}.get(language, "utf-8")
    url = f"https://{language}.example.org/{hashlib.sha256(title.encode()).hexdigest()[:8]}.html"
    return WebPage(url, render_html(page, linked, language=language, charset=charset).encode(charset), language, charset)


def revise(page: Page, generator: random.Random) -> Page:
    """A near copy: one word changed in the longest paragraph, and a line on the revision at the end."""
    longest = max(range(len(page.blocks)), key=lambda i: len(page.blocks[i][1]))
    words = page.blocks[longest][1].split()
    words[generator.randrange(1, len(words) - 1)] = "corresponding"
    blocks = list(page.blocks)
    blocks[longest] = ("paragraph", " ".join(words))
    return Page(page.name, (*blocks, ("paragraph", "This text was last revised in March.")))


def address(page: Page, host: str = "docs.example.org") -> str:
    """The page's URL; example.org and its sisters are reserved for documentation (RFC 2606)."""
    return f"https://{host}/{page.name.replace('.', '/')}.html"


def neighbours(pages: Sequence[Page], index: int) -> list[Page]:
    """The pages that a page's navigation links to."""
    return [pages[(index + step) % len(pages)] for step in range(1, 13)]


def render_html(page: Page, linked: Sequence[Page], *, language: str = "en", charset: str = "utf-8") -> str:
    """The page as HTML, with the navigation, notices and footer that surround text on the web."""
    links = "\n".join(f'<li><a href="/{p.name.replace(".", "/")}.html">{html.escape(p.name)}</a></li>' for p in linked)
    crumbs = " &raquo; ".join(f'<a href="#">{html.escape(part)}</a>' for part in page.name.split("."))
    return f"""<!DOCTYPE html>
<html lang="{language}">
<head><meta charset="{charset}"><title>{html.escape(page.name)} - Documentation</title>
<link rel="stylesheet" href="/style.css"><script>window.loaded = Date.now();</script></head>
<body>
<header><div class="logo">{FURNITURE[0]}</div>
<nav class="menu"><ul><li><a href="/">Home</a></li>
<li><a href="/search">Search</a></li><li><a href="/login">Log in</a></li></ul></nav>
<div class="breadcrumbs">{crumbs}</div></header>
<div class="cookie-banner" role="dialog">{FURNITURE[2]}. <button>Accept</button> <button>Decline</button></div>
<aside class="sidebar"><nav><ul>
{links}
</ul></nav></aside>
<main><article>
<h1>{html.escape(page.name)}</h1>
{render_blocks(page)}
</article></main>
<footer><p>{FURNITURE[1]} <a href="#">Yes</a> <a href="#">No</a></p>
<ul><li><a href="/terms">{FURNITURE[3]}</a></li><li><a href="/report">{FURNITURE[4]}</a></li></ul></footer>
</body>
</html>
"""


def render_blocks(page: Page) -> str:
    """The body of a page: headings, paragraphs, lists and listings."""
    tags = {"heading": "<h2>{}</h2>", "paragraph": "<p>{}</p>", "item": "<ul><li>{}</li></ul>", "code": "<pre>{}</pre>"}
    return "\n".join(tags[kind].format(html.escape(text, quote=False)) for kind, text in page.blocks).replace(
        "</ul>\n<ul>", "\n"
    )
