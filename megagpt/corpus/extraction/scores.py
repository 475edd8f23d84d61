"""How near an extractor's text comes to the known text of pages of published sets.

All sets are in one folder:

    extract/aeb             scrapinghub's article-extraction-benchmark
    extract/trafilatura     trafilatura's evaluation
    extract/cleaneval-dev   CleanEval
    extract/modern-dev      pages in Chinese and English: articles, and threads of forums
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from megagpt.corpus.readers.http import decode_text

Extractor: TypeAlias = Callable[[str], str]
"""HTML -> text."""


def body_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(html, article body) of each page of extract/aeb."""
    truth = json.loads((folder / "extract/aeb/ground-truth.json").read_text(encoding="utf-8"))
    for name in sorted(truth):
        html = gzip.decompress((folder / f"extract/aeb/html/{name}.html.gz").read_bytes()).decode("utf-8", "replace")
        yield html, truth[name]["articleBody"]


def segment_pages(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(html, segments the text must hold, segments it must not hold) of each page of extract/trafilatura."""
    pages = json.loads((folder / "extract/trafilatura/evaldata.json").read_text(encoding="utf-8"))
    for page in pages.values():
        body = gzip.decompress((folder / "extract/trafilatura/html" / (page["file"] + ".gz")).read_bytes())
        yield decode_text(body, None).text, page["with"], page["without"]


def score_bodies(folder: Path, extract: Extractor) -> tuple[float, float, float]:
    """(F1, precision, recall) as scrapinghub's evaluate.py computes them."""
    return average(list(body_pages(folder)), extract)


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


def cleaneval_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(html, gold text) of each page of extract/cleaneval-dev, without the gold's marks."""
    base = folder / "extract/cleaneval-dev"
    for path in sorted((base / "input").iterdir()):
        gold = next((base / "gold").glob(f"{path.name.partition('.')[0]}.*"))
        text = re.sub(r"<[hpl]>", " ", re.sub(r"\A\s*URL:.*", "", _plain(gold).decode("utf-8", "replace")))
        yield decode_text(_plain(path), None).text, text


def modern_pages(folder: Path, kind: str) -> Iterator[tuple[str, str]]:
    """(html, gold text) of each page of extract/modern-dev; kind: article or forum."""
    base = folder / "extract/modern-dev" / kind
    for name, page in sorted(json.loads((base / "gold.json").read_text(encoding="utf-8")).items()):
        yield decode_text(_plain(base / f"{name}.html.gz"), None).text, page["content"]


def of_means(scores: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(F1, precision, recall) of the means of each page's (precision, recall)."""
    precision, recall = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    return 2 * precision * recall / (precision + recall), precision, recall


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def average(pages: Sequence[tuple[str, str]], extract: Extractor) -> tuple[float, float, float]:
    """(F1, precision, recall) averaged over (html, gold text) of pages: 4-grams of words."""
    scores = [_page_score(_shingles(body), _shingles(extract(html))) for html, body in pages]
    precisions = [precision for precision, _ in scores if precision is not None]
    recalls = [recall for _, recall in scores if recall is not None]
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall), precision, recall


_TOKEN = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+")


def subsequence_score(gold: str, found: str) -> tuple[float, float]:
    """(precision, recall) of the longest common subsequence of words and ideographs."""
    true, seen = _TOKEN.findall(gold), _TOKEN.findall(found)
    length = _common_length(true, seen)
    return length / max(1, len(seen)), length / max(1, len(true))


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit per token of `first` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(first)) - 1
    bits = full
    for token in second:
        match = bits & places.get(token, 0)
        bits = ((bits + match) | (bits - match)) & full
    return len(first) - bits.bit_count()


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


def _page_score(true: Counter[tuple[str, ...]], found: Counter[tuple[str, ...]]) -> tuple[float | None, float | None]:
    hits = sum((true & found).values())
    extra, missed = found.total() - hits, true.total() - hits
    precision = hits / (hits + extra) if hits + extra else None
    recall = hits / (hits + missed) if hits + missed else None
    return precision, recall
