"""Scores of HTML extractors on published benchmarks, and pages per CPU second, in interleaved processes.

    python -m bench.data.extraction DATA_FOLDER [repetitions=5]

Body F1 (scrapinghub's article-extraction-benchmark): 4-grams of words of the article body, precision and recall averaged over
pages. Segments F (trafilatura's evaluation): text segments that the output must hold and must not hold. CleanEval's pages, with
the body score. Modern pages in Chinese and English, articles and threads of forums: longest common subsequence of words and
ideographs; their texts are also judged one by one: nothing, a wrong body (neither precision nor recall reaches .3), a part lost
(recall below .6), foreign text (precision below .6). datatrove's extractor runs in datatrove's environment, with the child
process and the time limit (raised to 60 s, so that a busy machine drops no page) that it always has; CPU seconds are those of
both processes. Only the pages are timed, not start-up. `datatrove=no` leaves it out. Writes results/extraction.json.
"""

import gzip
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Extractor: TypeAlias = Callable[[str], str]


def body_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(html, article body) of each page of extract/aeb."""
    truth = json.loads((folder / "extract/aeb/ground-truth.json").read_text(encoding="utf-8"))
    for name in sorted(truth):
        html = gzip.decompress((folder / f"extract/aeb/html/{name}.html.gz").read_bytes()).decode("utf-8", "replace")
        yield html, truth[name]["articleBody"]


def segment_pages(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(html, segments the text must hold, segments it must not hold) of each page of extract/trafilatura."""
    from megagpt.corpus.readers.http import decode_text

    pages = json.loads((folder / "extract/trafilatura/evaldata.json").read_text(encoding="utf-8"))
    for page in pages.values():
        body = gzip.decompress((folder / "extract/trafilatura/html" / (page["file"] + ".gz")).read_bytes())
        yield decode_text(body, None).text, page["with"], page["without"]


def score_bodies(folder: Path, extract: Extractor) -> tuple[float, float, float]:
    """(F1, precision, recall) as scrapinghub's evaluate.py computes them."""
    return _average(list(body_pages(folder)), extract)


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
    from megagpt.corpus.readers.http import decode_text

    base = folder / "extract/cleaneval-dev"
    for path in sorted((base / "input").iterdir()):
        gold = next((base / "gold").glob(f"{path.name.partition('.')[0]}.*"))
        text = re.sub(r"<[hpl]>", " ", re.sub(r"\A\s*URL:.*", "", _plain(gold).decode("utf-8", "replace")))
        yield decode_text(_plain(path), None).text, text


def modern_pages(folder: Path, kind: str) -> Iterator[tuple[str, str]]:
    """(html, gold text) of each page of extract/modern-dev; kind: article or forum."""
    from megagpt.corpus.readers.http import decode_text

    base = folder / "extract/modern-dev" / kind
    for name, page in sorted(json.loads((base / "gold.json").read_text(encoding="utf-8")).items()):
        yield decode_text(_plain(base / f"{name}.html.gz"), None).text, page["content"]


def all_pages(folder: Path) -> list[str]:
    """The pages of all sets."""
    modern = (page for kind in MODERN for page in modern_pages(folder, kind))
    return [html for html, *_ in (*body_pages(folder), *segment_pages(folder), *cleaneval_pages(folder), *modern)]


def extractor(name: str) -> Extractor:
    """One of the extractors that run in this environment."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    from megagpt.corpus.extraction.html import extract_html

    return {
        "megagpt": lambda html: extract_html(html).text,
        "trafilatura": lambda html: trafilatura.extract(html, include_comments=False) or "",
        "trafilatura_comments": lambda html: trafilatura.extract(html, include_comments=True) or "",
        "trafilatura_precise": lambda html: (
            trafilatura.extract(html, favor_precision=True, include_comments=False, deduplicate=True) or ""
        ),
        "resiliparse": lambda html: extract_plain_text(html, main_content=True, alt_texts=False),
    }[name]


SIDES = {
    "megagpt, fast": "megagpt",
    "trafilatura, defaults": "trafilatura",
    "trafilatura, with comments": "trafilatura_comments",
    "trafilatura, datatrove's arguments": "trafilatura_precise",
    "resiliparse, main_content": "resiliparse",
}


def extract_all(name: str, pages_file: Path, texts_file: Path) -> dict[str, float]:
    """Extract the pages in a JSON file, write the texts as JSON; CPU seconds of it."""
    pages = json.loads(pages_file.read_text(encoding="utf-8"))
    extract = extractor(name)
    extract(pages[0])
    started = time.process_time()
    texts = [extract(page) for page in pages]
    seconds = time.process_time() - started
    texts_file.write_text(json.dumps(texts), encoding="utf-8")
    return {"cpu_s": seconds, "pages": len(pages)}


def score(folder: Path, texts: Sequence[str]) -> dict[str, float]:
    """All scores of the texts of `all_pages`."""
    remaining = iter(texts)

    def lookup(_: str) -> str:
        return next(remaining)

    body, segments = score_bodies(folder, lookup), score_segments(folder, lookup)
    cleaneval = _average(list(cleaneval_pages(folder)), lookup)
    names = ("f1", "precision", "recall")
    groups = [("body", body), ("segments", segments), ("cleaneval", cleaneval)]
    failures: Counter[str] = Counter()
    for kind in MODERN:
        scores = [(html, *_subsequence_score(gold, lookup(html))) for html, gold in modern_pages(folder, kind)]
        groups.append((f"modern_{kind}", _of_means([score[1:] for score in scores])))
        failures.update(_failure(*score[1:]) for score in scores)
    failed = {f"modern_{name.replace(' ', '_')}_pages": failures[name] for name in FAILURES}
    found = {f"{group}_{name}": round(value, 4) for group, values in groups for name, value in zip(names, values, strict=True)}
    return {**found, **failed}


def main(words: list[str]) -> None:
    """Measure, or be one of the measured processes (`extract NAME PAGES TEXTS`)."""
    if words[0] == "extract":
        print(json.dumps(extract_all(words[1], Path(words[2]), Path(words[3]))))
        return
    from bench.data.parity import DATATROVE
    from bench.measure import peer_python, peer_versions, run_interleaved
    from megagpt.measurement import spread, write_results

    folder, options = Path(words[0]), dict(word.split("=", 1) for word in words[1:])
    python = None if options.get("datatrove") == "no" else peer_python("datatrove", DATATROVE)
    repetitions = int(options.get("repetitions", 5))
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch, "pages.json")
        pages.write_text(json.dumps(all_pages(folder)), encoding="utf-8")
        texts = {name: Path(scratch, f"{i}.json") for i, name in enumerate((*SIDES, "datatrove"))}
        commands = {
            name: [sys.executable, "-m", "bench.data.extraction", "extract", key, str(pages), str(texts[name])]
            for name, key in SIDES.items()
        }
        if python:
            command = ["-m", "bench.data.peers.datatrove", "extraction", str(pages), str(texts["datatrove"])]
            commands["datatrove"] = [str(python), *command]
        runs = run_interleaved(commands, repetitions)
        sides: dict[str, dict[str, Any]] = {}
        for name, found in runs.items():
            rates = spread([run.output["pages"] / run.output["cpu_s"] for run in found])
            speed = {f"pages_per_cpu_s_{key}": round(value, 1) for key, value in rates.items()}
            sides[name] = speed | score(folder, json.loads(texts[name].read_text(encoding="utf-8")))
    ours = sides["megagpt, fast"]["pages_per_cpu_s_median"]
    ratios = {name: round(ours / side["pages_per_cpu_s_median"], 2) for name, side in sides.items() if name != "megagpt, fast"}
    results = {"pages": runs["megagpt, fast"][0].output["pages"], "sides": sides, "megagpt_speed_over": ratios}
    print(json.dumps(results, indent=1))
    versions = peer_versions(python, ["datatrove", "trafilatura"]) if python else {}
    peers = {"datatrove": versions["datatrove"], "trafilatura of datatrove": versions["trafilatura"]} if versions else {}
    write_results("extraction", results, packages=["megagpt", "selectolax", "trafilatura", "resiliparse"], peers=peers)


MODERN = ("article", "forum")
FAILURES = ("nothing", "wrong body", "part lost", "foreign text")
_TOKEN = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+")


def _subsequence_score(gold: str, found: str) -> tuple[float, float]:
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


def _failure(precision: float, recall: float) -> str:
    """What is wrong with a page's text; "" if it is good enough."""
    if precision == recall == 0:
        return "nothing"
    if max(precision, recall) < 0.3:
        return "wrong body"
    return "part lost" if recall < 0.6 else "foreign text" if precision < 0.6 else ""


def _of_means(scores: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    precision, recall = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    return 2 * precision * recall / (precision + recall), precision, recall


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _average(pages: Sequence[tuple[str, str]], extract: Extractor) -> tuple[float, float, float]:
    """(F1, precision, recall) averaged over pages."""
    scores = [_page_score(_shingles(body), _shingles(extract(html))) for html, body in pages]
    precisions = [precision for precision, _ in scores if precision is not None]
    recalls = [recall for _, recall in scores if recall is not None]
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall), precision, recall


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
