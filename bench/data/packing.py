"""What packing and the overlap check do and cost: documents that are cut, with and without; text checked per second and core.

    python -m bench.data.packing            about 20 seconds, one core

Packing: 65,536 documents with the lengths of web pages (lognormal, median 400 tokens, sigma 1.1) into samples of 2,048 tokens;
counted are documents that would fit into one sample and are cut in two. Overlap check: documents of 300 words drawn by Zipf's
law from 50,000, looked up in an index of 2,000 validation documents, as `tools/tokenize_documents.py` does for every document.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megagpt.measurement import spread, write_results

SEQ_LEN = 2048
DOCUMENTS = 65_536


def main(words: Sequence[str]) -> None:
    """Measure both and write the tables."""
    packing, leaks = pack(), check_overlap()
    print(packing, leaks)
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip()
    tables = [{"title": "Leak check", "about": "One process, one thread.", "rows": leaks}]
    results = {"title": "Packing and leak check", "about": about, "rows": packing, "tables": tables, "lost": ""}
    write_results("pack", results, packages=("numpy", "numba"))


def pack() -> list[dict[str, Any]]:
    """Share of documents cut in the order given and in best-fit order."""
    from megagpt.corpus.packing.best_fit import best_fit_order, num_cut

    lengths = np.maximum(2, np.random.default_rng(0).lognormal(np.log(400), 1.1, DOCUMENTS)).astype(np.int64)
    fitting = int((lengths <= SEQ_LEN).sum())
    began = time.process_time()
    order = best_fit_order(lengths, SEQ_LEN, 0)
    seconds = time.process_time() - began
    counts = {"as given": (num_cut(lengths, SEQ_LEN), None), "best fit": (num_cut(lengths[order], SEQ_LEN), seconds)}
    return [
        {"order": name, "documents_that_fit": fitting, "cut": cut, "cut_percent": 100 * cut / fitting, "ordering_cpu_s": cpu_s}
        for name, (cut, cpu_s) in counts.items()
    ]


def check_overlap() -> list[dict[str, Any]]:
    """Megabytes of text per CPU second: lookups, and of that making the sets of shingles."""
    from megagpt.corpus.packing.overlap import WORDS_PER_SHINGLE, OverlapIndex, build_index, write_validation
    from megagpt.corpus.runner.blocks import batches
    from megagpt.corpus.text.shingles import distinct, shingles_of_texts

    texts = zipf_texts(22_000)
    with tempfile.TemporaryDirectory(prefix="bench_pack_") as temporary:
        folder = Path(temporary)
        write_validation(((f"v{i}", text) for i, text in enumerate(texts[:2000])), folder / "block")
        build_index([folder / "block"], folder / "index")
        index, rates, set_rates = OverlapIndex(folder / "index", 0.8), [], []
        index.find(texts[-1:])  # compiles
        for repetition in range(3):
            part = texts[2000 + 6000 * repetition : 8000 + 6000 * repetition]
            megabytes = sum(len(text.encode()) for text in part) / 1e6
            began = time.process_time()
            for batch in batches(part, len):
                index.find(batch)
            middle = time.process_time()
            for batch in batches(part, len):
                list(map(distinct, shingles_of_texts(batch, WORDS_PER_SHINGLE)[0]))
            rates.append(megabytes / (middle - began))
            set_rates.append(megabytes / (time.process_time() - middle))
    share = median(rates) / median(set_rates)
    return [
        {"checked_mb_per_cpu_s": spread(rates), "sets_alone_mb_per_cpu_s": spread(set_rates), "share_of_time_for_sets": share}
    ]


def zipf_texts(count: int) -> list[str]:
    """Texts of 300 words."""
    rng = np.random.default_rng(1)
    words = np.array([f"word{number:x}" for number in range(50_000)])
    share = 1.0 / np.arange(1, len(words) + 1)
    cumulated = np.cumsum(share / share.sum())
    texts = []
    for _ in range(0, count, 1000):
        chosen = np.searchsorted(cumulated, rng.random((1000, 300))).clip(max=len(words) - 1)
        texts += [" ".join(row) for row in words[chosen]]
    return texts


if __name__ == "__main__":
    main(sys.argv[1:])
