"""Generated tokens per second of tools/serve_model.py: 64 clients at once against one at a time.

    python -m bench.serving.throughput
    python -m bench.serving.throughput short=true

One server process with one thread, on this machine's CPU. Every client streams a greedy text; all texts of a model have to be
equal to that of a single client. Models: stories260K where the test data is there (a published TinyStories model, 260 thousand
parameters), and a 12M-parameter Llama with random weights. The two ways take turns; the ratio of medians counts.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.serving.process import running_server
from megagpt.convert.import_hf import ImportConfig, import_model, write_import
from megagpt.measurement import PROJECT, spread, write_results
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.tokenizer.open_tokenizer import open_tokenizer

NUM_CLIENTS = 64
ALONE = 2
"""Texts of a round with one client at a time: their speed does not depend on their number."""
LLAMA_12M = {"vocab_size": 320, "seq_len": 256, "num_layers": 6, "num_heads": 8, "hidden_size": 384, "mlp_size": 1024}
ABOUT = (
    "One server process with one thread on a CPU, greedy texts as streams; all texts of a model are equal. `ratio` is tokens "
    "per second with 64 clients over that with one client at a time."
)


def main(words: Sequence[str]) -> None:
    """Run both ways in turn, compare texts, write the table."""
    options = dict(word.split("=", 1) for word in words)
    short = options.get("short") == "true"
    repetitions = int(options.get("repetitions", 1 if short else 3))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_serving_") as folder:
        for name, run_dir, max_tokens in write_models(Path(folder), short=short):
            for num_slots in (64,) if short else (16, 64):
                words_of_server = (f"run_dir={run_dir}", f"num_slots={num_slots}")
                with running_server(Path(folder) / f"{name}_{num_slots}", *words_of_server) as (port, process):
                    rows.append({"model": name, "slots": num_slots, **measure(port, max_tokens, repetitions)})
                    process.terminate()
                    assert process.wait(timeout=60) == 0
                print(json.dumps(rows[-1]), flush=True)
    results = {"title": "Serving on CPU", "about": ABOUT, "rows": rows}
    write_results("serving", results, packages=("torch", "fastapi", "uvicorn"))


def write_models(folder: Path, *, short: bool) -> list[tuple[str, Path, int]]:
    """(name, run directory, tokens of a text) of each model."""
    models, data = [], PROJECT.parent / "shared" / "data" / "model"
    if (data / "stories260K.bin").is_file():
        source, words = data / "stories260K.bin", data / "tok512.bin"
        import_model(ImportConfig(source=source, run_dir=folder / "stories260K", tokenizer=words))
        models.append(("stories260K", folder / "stories260K", 40 if short else 100))
    if not short or not models:
        config, tokenizer = ModelConfig(**LLAMA_12M), open_tokenizer("bytes")
        model = GPT(config).requires_grad_(False)
        initialise(model, seed=1)
        parameters, run_dir = dict(model.named_parameters()), folder / "llama_12M"
        write_import(run_dir, config, tokenizer, iter(parameters.items()), [(name,) for name in parameters], {})
        (run_dir / "tokenizer").mkdir()
        tokenizer.save(run_dir / "tokenizer")
        models.append(("Llama 12M", run_dir, 20 if short else 40))
    return models


def measure(port: int, max_tokens: int, repetitions: int) -> dict[str, Any]:
    """Tokens per second both ways, after a few tokens of each to warm up."""
    rates: dict[str, list[float]] = {"one": [], "many": []}
    asyncio.run(ask(port, 2, NUM_CLIENTS, NUM_CLIENTS))
    for _ in range(repetitions):
        for name, at_once, total in (("one", 1, ALONE), ("many", NUM_CLIENTS, NUM_CLIENTS)):
            began = time.perf_counter()
            texts = asyncio.run(ask(port, max_tokens, at_once, total))
            seconds = time.perf_counter() - began
            if len(set(texts)) != 1:
                raise SystemExit(f"{len(set(texts))} different texts")
            rates[name].append(sum(count for _, count in texts) / seconds)
    return {
        "clients": NUM_CLIENTS,
        "tokens_per_text": max_tokens,
        "one_at_a_time_tokens_per_s": spread(rates["one"]),
        "at_once_tokens_per_s": spread(rates["many"]),
        "ratio": median(rates["many"]) / median(rates["one"]),
    }


async def ask(port: int, max_tokens: int, at_once: int, total: int) -> list[tuple[str, int]]:
    """(text, generated tokens) of `total` streams, `at_once` of them at a time."""
    body = {"prompt": "", "max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:

        async def one() -> tuple[str, int]:
            async with gate, client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
            chunks = [json.loads(line) for line in lines[:-1]]
            text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
            return text, chunks[-1]["usage"]["completion_tokens"]

        return await asyncio.gather(*(one() for _ in range(total)))


if __name__ == "__main__":
    main(sys.argv[1:])
