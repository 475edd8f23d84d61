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

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.corpus.extraction.scores import (
    Extractor,
    average,
    body_pages,
    cleaneval_pages,
    modern_pages,
    of_means,
    score_bodies,
    score_segments,
    segment_pages,
    subsequence_score,
)


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
    cleaneval = average(list(cleaneval_pages(folder)), lookup)
    names = ("f1", "precision", "recall")
    groups = [("body", body), ("segments", segments), ("cleaneval", cleaneval)]
    failures: Counter[str] = Counter()
    for kind in MODERN:
        scores = [(html, *subsequence_score(gold, lookup(html))) for html, gold in modern_pages(folder, kind)]
        groups.append((f"modern_{kind}", of_means([score[1:] for score in scores])))
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


def _failure(precision: float, recall: float) -> str:
    """What is wrong with a page's text; "" if it is good enough."""
    if precision == recall == 0:
        return "nothing"
    if max(precision, recall) < 0.3:
        return "wrong body"
    return "part lost" if recall < 0.6 else "foreign text" if precision < 0.6 else ""


if __name__ == "__main__":
    main(sys.argv[1:])
