"""Sections of generated documentation that extraction keeps: whether the first sentence of each is in the text of its page.

    python -m bench.data.documentation NAME=FOLDER...

Each FOLDER holds HTML pages, such as those of a Debian documentation package (`apt-get download NAME`, then `dpkg -x`).
A section is an element `section`, or a `div` of class section, sect1 to sect5, refsect1 to refsect3 or chapter, whose first
heading is followed by a paragraph (`p`), directly or in the section's title page; the sentence is the paragraph's first ten
words, or all of it if it has fewer. The pages are read by lexbor alone. Writes results/documentation.json.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser, LexborNode

_CLASSES = [*(f"sect{n}" for n in range(1, 6)), *(f"refsect{n}" for n in range(1, 4)), "section", "chapter"]
_SECTIONS = ", ".join(["section", *(f"div.{name}" for name in _CLASSES)])
_WORD = re.compile(r"\w+")
NUM_WORDS = 10


def first_sentences(page: str) -> Iterator[str]:
    """The first words of the first paragraph of each section of a page that begins with a heading and a paragraph."""
    tree = LexborHTMLParser(page)
    for section in tree.css(_SECTIONS):
        paragraph = _first_paragraph(section)
        words = _WORD.findall(paragraph.text(deep=True)) if paragraph is not None else []
        if words:
            yield " ".join(words[:NUM_WORDS])


def _first_paragraph(section: LexborNode) -> LexborNode | None:
    """The paragraph that follows the heading with which a section begins."""
    children = list(section.iter(include_text=False))
    while children and children[0].tag in ("span", "a"):
        children = children[1:]
    if len(children) < 2 or children[1].tag != "p":
        return None
    title = children[0]
    return children[1] if re.fullmatch("h[1-6]", title.tag or "") or title.css_first("h1, h2, h3, h4, h5, h6") else None


def count_folder(folder: Path) -> dict[str, int | float | list[str]]:
    """How many sections the pages of a folder have, and of how many the first sentence is in the page's text."""
    from megagpt.corpus.extraction.html import extract_html
    from megagpt.corpus.readers.http import decode_text

    pages = sections = found = 0
    missing: list[str] = []
    for path in sorted(folder.rglob("*.htm*")):
        if not path.is_file():
            continue
        page = decode_text(path.read_bytes(), None).text
        sentences = list(first_sentences(page))
        text = f" {' '.join(_WORD.findall(extract_html(page).text))} "
        hits = [f" {sentence} " in text for sentence in sentences]
        pages, sections, found = pages + 1, sections + len(hits), found + sum(hits)
        missing += [f"{path.name}: {sentence}" for sentence, hit in zip(sentences, hits, strict=True) if not hit]
    if not sections:
        raise SystemExit(f"{folder}: no sections with a heading and a paragraph in its HTML pages")
    return {
        "pages": pages,
        "sections": sections,
        "found": found,
        "share_found": round(found / sections, 4),
        "missing": missing[:20],
    }


def main(words: list[str]) -> None:
    from megagpt.measurement import write_results

    if not words or not all("=" in word for word in words):
        raise SystemExit("usage: python -m bench.data.documentation NAME=FOLDER...")
    folders = dict(word.split("=", 1) for word in words)
    counts = {name: count_folder(Path(folder)) for name, folder in folders.items()}
    results = {
        "title": "Sections of documentation",
        "about": "Of the sections of generated documentation that begin with a heading and a paragraph: how many have the "
        "paragraph's first ten words in the text that extraction makes of the page. One row per Debian package.",
        "rows": [
            {"package": name, **{key: value for key, value in found.items() if key != "missing"}}
            for name, found in counts.items()
        ],
        "missing": {name: found["missing"] for name, found in counts.items()},
        "lost": "",
    }
    print(json.dumps(results, indent=1, ensure_ascii=False))
    write_results("documentation", results, packages=["megagpt", "selectolax"])


if __name__ == "__main__":
    main(sys.argv[1:])
