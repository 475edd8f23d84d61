"""Near-duplicate removal against comparing everything with everything, under an address-space limit of 2 GiB per process.

    python -m bench.data.dedup_oracle [NUM_DOCUMENTS]

Documents are made of random words: pairs of a planted similarity of .5 to .95, a family that is a tenth of all (20,000 of the
default 200,000) edited from one template, a chain of which each link differs from the one before by a word, and exact copies. A
drop is right if the document is at least .8 similar (Jaccard, sets of 5 words) to one that stays. What should have been dropped
is found apart from the tool's code: every pair of kept documents that reaches .8, by prefix filtering, which misses none.
Writes results/dedup_oracle.json.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from bench.measure import run_once
from megagpt.measurement import write_results

THRESHOLD = 0.8
ADDRESS_SPACE_BYTES = 2 << 30
WORDS, SHINGLE = 30_000, 5
FILES = 4
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def make_documents(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(word numbers of each document, its kind 0 to 4: original, planted pair, template family, chain, exact copy), mixed."""
    rng = np.random.default_rng(7)
    kinds = np.repeat(np.arange(5), [count - sum(_parts(count)), *_parts(count)])
    originals = [rng.integers(0, WORDS, rng.integers(80, 301)) for _ in range(int((kinds == 0).sum()))]
    pairs, family, chain, copies = _parts(count)
    documents = list(originals)
    documents += [_edited(originals[rng.integers(len(originals))], rng.uniform(0.5, 0.95), rng) for _ in range(pairs)]
    template = rng.integers(0, WORDS, 200)
    documents += [_edited(template, rng.uniform(0.6, 0.97), rng) for _ in range(family)]
    link = rng.integers(0, WORDS, 200)
    for _ in range(chain):
        link = link.copy()
        link[rng.integers(link.size)] = rng.integers(WORDS)
        documents.append(link)
    documents += [originals[rng.integers(len(originals))] for _ in range(copies)]
    order = rng.permutation(count)
    return [documents[i] for i in order], kinds[order]


def write_inputs(documents: list[np.ndarray], folder: Path) -> None:
    """Write the documents as FILES document files, in order."""
    from megagpt.documents import Document, write_documents

    rng = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = sorted({"".join(rng.choice(letters, rng.integers(4, 10))) for _ in range(2 * WORDS)})[:WORDS]
    per_file = -(-len(documents) // FILES)
    for number in range(FILES):
        part = documents[number * per_file : (number + 1) * per_file]
        texts = (" ".join([vocabulary[word] for word in words.tolist()]) for words in part)
        first = number * per_file
        numbered = (Document(str(first + i), text, "synthetic") for i, text in enumerate(texts))
        write_documents(folder / f"part{number}.jsonl.zst", numbered)


def shingle_sets(documents: list[np.ndarray]) -> list[np.ndarray]:
    """The distinct 64-bit hashes of 5 consecutive words of each document, ascending."""
    with np.errstate(over="ignore"):
        found = []
        for words in documents:
            value = np.zeros(words.size - SHINGLE + 1, np.uint64)
            for i in range(SHINGLE):
                value = (value ^ words[i : i + value.size].astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
                value ^= value >> np.uint64(29)
            found.append(np.unique(value))
    return found


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two ascending sets."""
    common = np.intersect1d(a, b, assume_unique=True).size
    return common / (a.size + b.size - common)


def missed_documents(sets: list[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """Those of the `chosen` documents (numbers) whose similarity to an earlier chosen one reaches the threshold.

    Sets are put in one order, the rarest elements first; two of Jaccard similarity s share one of the first
    |x| - ceil(s |x|) + 1 elements of each (Bayardo, Ma and Srikant 2007), so all that share one are compared.
    """
    everything = np.concatenate([sets[i] for i in chosen])
    values, counts = np.unique(everything, return_counts=True)
    keys, owners = [], []
    for number in chosen.tolist():
        elements = sets[number]
        rarity = counts[np.searchsorted(values, elements)]
        length = elements.size - int(np.ceil(THRESHOLD * elements.size - 1e-9)) + 1
        chosen_ones = np.lexsort((elements, rarity))[:length]
        prefix = elements[chosen_ones][rarity[chosen_ones] > 1]
        keys.append(prefix)
        owners.append(np.full(prefix.size, number))
    key, owner = np.concatenate(keys), np.concatenate(owners)
    order = np.lexsort((owner, key))
    key, owner = key[order], owner[order]
    bounds = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1], [True]]))
    starts = np.concatenate([[0], np.cumsum([elements.size for elements in sets])])
    return np.flatnonzero(_mark_similar(owner, bounds, starts, np.concatenate(sets), THRESHOLD))


@njit
def _mark_similar(owner, bounds, starts, elements, threshold):
    """Which documents are similar to an earlier one of a group [bounds[i], bounds[i + 1]) of `owner`: bool by number."""
    found = np.zeros(starts.size - 1, np.bool_)
    for group in range(bounds.size - 1):
        for i in range(bounds[group], bounds[group + 1]):
            for j in range(i + 1, bounds[group + 1]):
                a, b = owner[i], owner[j]
                if found[b]:
                    continue
                x, y, common = starts[a], starts[b], 0
                needed = threshold / (1 + threshold) * (starts[a + 1] - x + starts[b + 1] - y) - 1e-9
                while x < starts[a + 1] and y < starts[b + 1] and common + min(starts[a + 1] - x, starts[b + 1] - y) >= needed:
                    p, q = elements[x], elements[y]
                    common += p == q
                    x += p <= q
                    y += q <= p
                found[b] = common >= needed
    return found


def judge(documents: list[np.ndarray], kinds: np.ndarray, output: Path) -> dict[str, Any]:
    """Precision and recall of what the tool did."""
    from megagpt.documents import decompressed

    sets = shingle_sets(documents)
    kept_by = np.full(len(documents), -1)
    for path in sorted((output / "duplicates").glob("*.jsonl.zst")):
        with path.open("rb") as file:
            for line in b"".join(decompressed(file, ".zst")).splitlines():
                value = json.loads(line)
                kept_by[int(value["dropped"])] = int(value["kept"])
    dropped, kept = np.flatnonzero(kept_by >= 0), np.flatnonzero(kept_by < 0)
    right = sum(kept_by[kept_by[i]] < 0 and jaccard(sets[i], sets[kept_by[i]]) >= THRESHOLD for i in dropped.tolist())
    missed = missed_documents(sets, kept)
    names = ("originals", "planted_pairs", "template_family", "chain", "exact_copies")
    return {
        "documents": len(documents),
        "kept": int(kept.size),
        "dropped": int(dropped.size),
        "dropped_rightly": int(right),
        "missed": int(missed.size),
        "precision": round(right / dropped.size, 5),
        "recall": round(right / (right + missed.size), 5),
        "kept_by_kind": {name: int((kinds[kept] == i).sum()) for i, name in enumerate(names)},
        "documents_by_kind": {name: int((kinds == i).sum()) for i, name in enumerate(names)},
        "missed_by_kind": {name: int((kinds[missed] == i).sum()) for i, name in enumerate(names)},
    }


def main(words: list[str]) -> None:
    """Make the documents, run the tool on them, judge what it did."""
    count = int(words[0]) if words else 200_000
    documents, kinds = make_documents(count)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_inputs(documents, work / "inputs")
        command = [
            sys.executable, "tools/dedup_documents.py", f"work_dir={work}", "num_workers=1",
            f"dedup.inputs=[{work}/inputs/*.jsonl.zst]",
        ]  # fmt: skip
        limited = f"ulimit -v {ADDRESS_SPACE_BYTES // 1024} && exec {shlex.join(command)}"
        run = run_once(["bash", "-c", limited], environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        results = judge(documents, kinds, work / "dedup")
    results |= {
        "address_space_limit_bytes": ADDRESS_SPACE_BYTES,
        "peak_memory_mib": round(run.peak_rss_bytes / 2**20),
        "cpu_s": round(run.cpu_s, 1),
        "wall_s": round(run.wall_s, 1),
    }
    print(json.dumps(results, indent=1))
    write_results("dedup_oracle", results, packages=["megagpt", "numba", "numpy"])


def _parts(count: int) -> tuple[int, int, int, int]:
    """Documents of planted pairs, the template family, the chain, and exact copies."""
    return count * 18 // 100, count // 10, min(2000, count // 50), count // 100


def _edited(words: np.ndarray, similarity: float, rng: np.random.Generator) -> np.ndarray:
    """Words replaced one by one until about this similarity is left: each one changes 5 of the document's shingles."""
    shingles = words.size - SHINGLE + 1
    changed = shingles * (1 - similarity) / (1 + similarity)
    edited = words.copy()
    places = rng.choice(words.size, max(1, round(changed / SHINGLE)), replace=False)
    edited[places] = rng.integers(0, WORDS, places.size)
    return edited


if __name__ == "__main__":
    main(sys.argv[1:])
