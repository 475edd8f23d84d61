"""Scores of HTML extractors on two published benchmarks, with pages per CPU second, side by side in one process.

    python bench/extraction.py DATA_FOLDER [EXTRACTOR ...]

Body F1 (scrapinghub's article-extraction-benchmark): 4-grams of words of the article body, precision and recall averaged over
pages. Segments F (trafilatura's evaluation): text segments that the output must hold and must not hold.
"""

import gzip
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

Extractor: TypeAlias = Callable[[str], str]


def body_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(html, article body) of each page of extract/aeb."""
    truth = json.loads((folder / "extract/aeb/ground-truth.json").read_text(encoding="utf-8"))
    for name in sorted(truth):
        html = gzip.decompress((folder / f"extract/aeb/html/{name}.html.gz").read_bytes()).decode("utf-8", "replace")
        yield html, truth[name]["articleBody"]


def segment_pages(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(html, segments the text must hold, segments it must not hold) of each page of extract/trafilatura."""
    from megagpt.corpus.http import decode_text

    pages = json.loads((folder / "extract/trafilatura/evaldata.json").read_text(encoding="utf-8"))
    for page in pages.values():
        body = gzip.decompress((folder / "extract/trafilatura/html" / (page["file"] + ".gz")).read_bytes())
        yield decode_text(body, None).text, page["with"], page["without"]


def score_bodies(folder: Path, extract: Extractor) -> tuple[float, float, float]:
    """(F1, precision, recall) as scrapinghub's evaluate.py computes them."""
    precisions, recalls = [], []
    for html, body in body_pages(folder):
        precision, recall = _page_score(_shingles(body), _shingles(extract(html)))
        precisions += [] if precision is None else [precision]
        recalls += [] if recall is None else [recall]
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall), precision, recall


def score_segments(folder: Path, extract: Extractor) -> tuple[float, float, float]:
    """(F, precision, recall) over all segments, as trafilatura's evaluation counts them."""
    found = missed = wrong = 0
    for html, wanted, unwanted in segment_pages(folder):
        text = extract(html)
        hits = sum(segment in text for segment in wanted)
        found, missed = found + hits, missed + len(wanted) - hits
        wrong += sum(segment in text for segment in unwanted)
    precision, recall = found / (found + wrong), found / (found + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def extractors() -> dict[str, Extractor]:
    """The extractors to compare, by name."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    from megagpt.corpus.extract import extract_html

    def precise(html: str) -> str:
        return trafilatura.extract(html, favor_precision=True, include_comments=False, deduplicate=True) or ""

    return {
        "megagpt": lambda html: extract_html(html).text,
        "trafilatura": lambda html: trafilatura.extract(html, include_comments=False) or "",
        "trafilatura, datatrove's arguments": precise,
        "resiliparse main_content": lambda html: extract_plain_text(html, main_content=True, alt_texts=False),
    }


def main(words: list[str]) -> None:
    """Print one line per extractor."""
    folder, names = Path(words[0]), words[1:]
    for name, extract in extractors().items():
        if names and name not in names:
            continue
        body, segments = score_bodies(folder, extract), score_segments(folder, extract)
        pages = [html for html, *_ in (*body_pages(folder), *segment_pages(folder))]
        started = time.process_time()
        for html in pages:
            extract(html)
        seconds = time.process_time() - started
        shown = ["{:.3f} (P {:.3f} R {:.3f})".format(*score) for score in (body, segments)]
        print(f"{name:36} body F1 {shown[0]}   segments F {shown[1]}   {len(pages) / seconds:.0f} pages/CPU s", flush=True)


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


def _page_score(true: Counter[tuple[str, ...]], found: Counter[tuple[str, ...]]) -> tuple[float | None, float | None]:
    hits = sum((true & found).values())
    extra, missed = found.total() - hits, true.total() - hits
    precision = hits / (hits + extra) if hits + extra else None
    recall = hits / (hits + missed) if hits + missed else None
    return precision, recall


if __name__ == "__main__":
    main(sys.argv[1:])
