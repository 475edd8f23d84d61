"""Generated tokens per second on CPU: MegaGPT against transformers with the same weights, one thread each.

    python -m bench.generation.compare
    python -m bench.generation.compare short=true

Greedy, key/value cache on, end-of-text ignored so that every row gets all its tokens; the token ids of both must be equal.
Models: stories260K where the test data is there (a published TinyStories model, 260 thousand parameters), and a 50M-parameter
Llama with random weights. Runs are interleaved, each a process of its own that generates once to warm up and then five times,
of which the median counts.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import peer_python, peer_versions, run_interleaved
from bench.training.compare import MODELS, PEERS
from megagpt.convert.llama2c import load_llama2c
from megagpt.measurement import PROJECT, spread, write_results
from megagpt.model.gpt import GPT, ModelConfig, initialise

CASES = {"one row": (1, 16), "eight rows": (8, 16), "long prompt": (1, 256)}
"""(rows, tokens of the prompt) of each case."""
WHY = (
    "With 50M parameters a token of one row is almost only matrix-vector products over all weights, which both make by the "
    "same kernels: what differs lies within the spread of shared cores."
)
NEW_TOKENS = {"stories260K": 200, "50M": 40}


def main(words: Sequence[str]) -> None:
    """Run, compare ids, write the table."""
    options = dict(word.split("=", 1) for word in words)
    short = options.get("short") == "true"
    python = {"megagpt": Path(sys.executable), "transformers": peer_python("transformers", PEERS["transformers"])}
    repetitions = int(options.get("repetitions", 1 if short else 3))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_generation_") as folder:
        for name in write_models(Path(folder)):
            for case, (batch, prompt) in list(CASES.items())[: 1 if short else None]:
                job = {"weights": f"{folder}/{name}.pt", "model": f"{folder}/{name}.json", "batch": batch, "prompt": prompt}
                path = Path(folder) / f"{name}_{case}.json".replace(" ", "_")
                path.write_text(json.dumps({**job, "new": 20 if short else NEW_TOKENS[name]}), encoding="utf-8")
                commands = {p: [str(python[p]), "-m", f"bench.generation.peers.{p}", str(path)] for p in python}
                paths = str(PROJECT)
                environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
                runs = run_interleaved(commands, repetitions, environment=environment)
                rows.append(row_of(name, case, runs))
                print(json.dumps(rows[-1]), flush=True)
    lost = [f"{r['model']}, {r['case']}: {r['ratio_to_transformers']['median']:.2f}" for r in rows]
    lost = [text for text, r in zip(lost, rows, strict=True) if r["ratio_to_transformers"]["median"] < 1]
    results = {
        "title": "Generation on CPU",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "rows": rows,
        "lost": f"Fewer tokens per CPU second than transformers: {'; '.join(lost)}. {WHY}" if lost else "",
    }
    if not short:
        peers = peer_versions(python["transformers"], ["torch", "transformers"])
        write_results("generation", results, packages=("torch",), peers=peers)


def row_of(model: str, case: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Rates of both and their ratio. Raises SystemExit if they did not generate the same ids."""
    rates = {name: [run.output["tokens_per_s"] for run in mine] for name, mine in runs.items()}
    ids = {name: mine[0].output["ids"] for name, mine in runs.items()}
    if ids["megagpt"] != ids["transformers"]:
        raise SystemExit(f"{model}, {case}: other ids than transformers: {ids}")
    ratios = [a / b for a, b in zip(rates["megagpt"], rates["transformers"], strict=True)]
    return {
        "model": model,
        "case": case,
        "megagpt_tokens_per_cpu_s": median(rates["megagpt"]),
        "transformers_tokens_per_cpu_s": median(rates["transformers"]),
        "ratio_to_transformers": spread(ratios),
        "megagpt_peak_rss_mib": max(run.peak_rss_bytes for run in runs["megagpt"]) / 2**20,
        "transformers_peak_rss_mib": max(run.peak_rss_bytes for run in runs["transformers"]) / 2**20,
    }


def write_models(folder: Path) -> list[str]:
    """Write <name>.pt (our state dict) and <name>.json (sizes); returns the names."""
    config = ModelConfig(**{"family": "llama", "seq_len": 512, **MODELS["50M"]})
    model = GPT(config)
    initialise(model, seed=5)
    models = {"50M": model}
    data = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data")) / "model" / "stories260K.bin"
    if data.exists():
        models = {"stories260K": load_llama2c(data), **models}
    for name, each in models.items():
        torch.save(each.state_dict(), folder / f"{name}.pt")
        values = each.config.model_dump(mode="json") | {"mlp_size": each.config.mlp_width}
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return list(models)


if __name__ == "__main__":
    main(sys.argv[1:])
