"""A model trained on 512 tokens and extended to 4,096: loss by position, and a needle in a haystack; on a CPU.

    python -m bench.training.long_context               some 40 minutes on one core
    python -m bench.training.long_context seeds=1       a third of it
    python -m bench.training.long_context steps=20      to see that it works; writes nothing

Documents are text of Python's own library with facts in it, a key byte of 96 and a value byte of 32. A document gives each of
its keys one value, so a value can be known if its key has come before; only values have a loss. A Llama of 0.4M parameters is
trained by tools/train_model.py on documents and samples of 512 tokens. Then the run goes on with those of 4,096, by
continue_from and rope_scaling (yarn, factor 8), for two fifths of the tokens. Beside it: the same run without extension; the
same with the rotary positions stretched, without training; the same trained on 512 for as many tokens as the extended one.

Loss by position: values of 96 keys in new documents of 4,096 tokens, 256 values each; a reader who remembers everything pays
ln 32 for the first value of a key and nothing after it. Needle: text with one fact at a depth from 0 (its beginning) to 1 (16
bytes before its end), the key again at the end; found if the likeliest next byte is the value, by chance one of 32.
"""

import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints
from megagpt.data.shards import Manifest, ShardWriter, write_manifest
from megagpt.measurement import PROJECT, write_results
from megagpt.model.gpt import GPT
from megagpt.report.inspect_data import check_ledger
from megagpt.tokenizer.open_tokenizer import open_tokenizer

SHORT, LONG, FACTOR = 512, 4096, 8
STEPS, MORE_STEPS = 1000, 100
BATCH, LONG_BATCH = 8, 4
"""Samples per step of 512 and of 4,096 tokens."""
SEEDS = (1, 2, 3)
NUM_KEYS, NUM_VALUES, FIRST_KEY = 96, 32, 128
FIRST_VALUE = FIRST_KEY + NUM_KEYS
KEYS_OF_A_DOCUMENT, BYTES_PER_FACT = (2, 4, 8, 16, 32, 96), (2, 4, 16)
"""What a training document draws from: how many keys it uses, and how far apart its facts are."""
LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES, DOCUMENTS, BIN = 16, 32, 512
YARN = ("model.rope_scaling.kind=yarn", f"model.rope_scaling.factor={FACTOR}", f"model.rope_scaling.original_seq_len={SHORT}")
SETTINGS = (
    "model.family=llama", "model.vocab_size=257", "model.num_layers=2", "model.num_heads=4", "model.hidden_size=128",
    "model.mlp_size=256", "engine={kind: fsdp}", "optim.lr=2e-3", "optim.schedule.kind=constant",
    "optim.schedule.warmup_steps=16", "monitor.log_every_steps=50", "evaluate_every_steps=0", "sample_every_steps=0",
    "save_every_steps=500", "watchdog.enabled=false", "guard.enabled=false", "data.document_mask=false",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Texts:
    """Bytes of Python's library without those that facts are made of."""

    data: np.ndarray

    def cut(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A piece at random, [length] of ids."""
        start = rng.integers(len(self.data) - length)
        return self.data[start : start + length].astype(np.int64)


def read_texts() -> Texts:
    """The library of this Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)
    return Texts(data[data < FIRST_KEY])


def document(
    texts: Texts, rng: np.random.Generator, length: int, num_keys: int, bytes_per_fact: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text with facts, [length] of ids, and the places of their keys, [facts]."""
    ids = texts.cut(rng, length)
    places = 2 * np.sort(rng.choice(length // 2 - 1, length // bytes_per_fact - 1, replace=False))
    used, values = rng.choice(NUM_KEYS, num_keys, replace=False), rng.integers(NUM_VALUES, size=NUM_KEYS)
    keys = rng.choice(used, len(places))
    ids[places], ids[places + 1] = FIRST_KEY + keys, FIRST_VALUE + values[keys]
    return ids, places


def haystack(texts: Texts, rng: np.random.Generator, length: int, depth: float) -> tuple[np.ndarray, int]:
    """Text with one fact and its key at the end, [length] of ids; the value."""
    ids = texts.cut(rng, length)
    key, value, place = FIRST_KEY + rng.integers(NUM_KEYS), FIRST_VALUE + rng.integers(NUM_VALUES), round(depth * (length - 18))
    ids[place], ids[place + 1], ids[-1] = key, value, key
    return ids, int(value)


def write_shards(folder: Path, documents: int, length: int, seed: int) -> Path:
    """A source of documents of `length` tokens, the end of text included; only values are targets."""
    texts, rng, tokenizer = read_texts(), np.random.default_rng(seed), open_tokenizer("bytes")
    with ShardWriter(folder / "train", "shard_00000", np.dtype("uint16"), masked=True) as writer:
        for number in range(documents + 1):  # the last sample needs one more token
            ids, _ = document(texts, rng, length, int(rng.choice(KEYS_OF_A_DOCUMENT)), int(rng.choice(BYTES_PER_FACT)))
            ids[-1] = tokenizer.eot_id
            is_target = (ids >= FIRST_VALUE) & (ids < FIRST_VALUE + NUM_VALUES)
            rows = {"id": [str(number)], "url": [None], "source": ["facts"], "bytes": [length]}
            writer.add_many(ids, [length], rows, is_target)
        info = writer.close()
    manifest = Manifest("train", "uint16", 257, tokenizer.eot_id, tokenizer.fingerprint, "", (info,))
    write_manifest(folder / "train", manifest)
    tokenizer.save(folder / "tokenizer")
    return folder


def train(run_dir: Path, shards: Path, seq_len: int, max_steps: int, seed: int, *more: str) -> Path:
    """Train with the project's tool; the run. Raises SystemExit with what it printed if it fails."""
    batch = BATCH if seq_len == SHORT else LONG_BATCH
    words = [f"run_dir={run_dir}", f"max_steps={max_steps}", f"global_batch_size={batch}", f"micro_batch_size={batch}"]
    words += ["precision=fp32", f"data.seq_len={seq_len}", f"model.seq_len={seq_len}", f"seed={seed}"]
    words += [f"data.sources.{'short' if seq_len == SHORT else 'long'}.path={shards}", *SETTINGS, *more]
    command = [sys.executable, str(PROJECT / "tools" / "train_model.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return run_dir


def longer(run_dir: Path, **changes: Any) -> GPT:
    """A run's model for up to 4,096 tokens, its settings changed."""
    loaded = load_model(run_dir)
    model = GPT(loaded.model_config.model_copy(update={"seq_len": LONG, **changes}))
    model.load_state_dict(loaded.model.state_dict())
    return model.eval()


@torch.no_grad()
def loss_by_position(model: GPT, seed: int) -> list[float]:
    """Mean loss of the values in each BIN of positions."""
    texts, rng = read_texts(), np.random.default_rng(seed)
    losses = np.zeros((2, LONG // BIN))
    for _ in range(DOCUMENTS):
        ids, places = document(texts, rng, LONG, NUM_KEYS, 16)
        targets = np.full(LONG, -100)
        targets[places] = ids[places + 1]
        model(torch.tensor(ids)[None], torch.tensor(targets)[None])
        assert model.last_layer.token_losses is not None
        add_by_bin(losses, places, model.last_layer.token_losses[0, places].double().numpy())
    return (losses[0] / losses[1]).tolist()


def perfect_reader(seed: int) -> list[float]:
    """The loss in each BIN of who remembers every value, on the same documents."""
    texts, rng = read_texts(), np.random.default_rng(seed)
    losses = np.zeros((2, LONG // BIN))
    for _ in range(DOCUMENTS):
        ids, places = document(texts, rng, LONG, NUM_KEYS, 16)
        first = np.zeros(len(places))
        first[np.unique(ids[places], return_index=True)[1]] = math.log(NUM_VALUES)
        add_by_bin(losses, places, first)
    return (losses[0] / losses[1]).tolist()


def add_by_bin(losses: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Add sums and counts of the values at these places."""
    np.add.at(losses[0], places // BIN, values)
    np.add.at(losses[1], places // BIN, 1)


@torch.no_grad()
def found_needles(model: GPT, seed: int) -> Iterator[tuple[int, float, float]]:
    """Length, depth and the share of needles found there."""
    texts, rng = read_texts(), np.random.default_rng(seed)
    for length in LENGTHS:
        for depth in DEPTHS:
            found = 0
            for _ in range(NEEDLES):
                ids, value = haystack(texts, rng, length, depth)
                found += int(model(torch.tensor(ids)[None])[0, -1].argmax()) == value
            yield length, depth, found / NEEDLES


def one_seed(folder: Path, seed: int, steps: int, more_steps: int) -> tuple[dict[str, GPT], list[str]]:
    """The models to compare, by what was done with them; what the ledgers of base and extension show."""
    short_steps = steps + more_steps * LONG_BATCH * LONG // (BATCH * SHORT)
    short = write_shards(folder / "short", short_steps * BATCH, SHORT, seed)
    long = write_shards(folder / "long", max(more_steps * LONG_BATCH, 65), LONG, 100 + seed)
    base = train(folder / "base", short, SHORT, steps, seed)
    last = f"continue_from={list_checkpoints(base)[-1]}"
    extended = train(folder / "extended", long, LONG, steps + more_steps, seed, last, *YARN, "allow_change=[data.weights]")
    as_before = train(folder / "as_before", short, SHORT, short_steps, seed, last)
    scaling = load_model(extended).model_config.rope_scaling
    models = {
        "extended to 4,096": longer(extended),
        "512, as it is": longer(base),
        "512, positions stretched, not trained": longer(base, rope_scaling=scaling),
        "512, as many tokens as the extended": longer(as_before),
    }
    return models, [line for run_dir in (base, extended) for line in check_ledger(run_dir)]


def main(words: Sequence[str]) -> None:
    """Train, evaluate, print and write the tables."""
    torch.set_num_threads(1)
    options = dict(word.split("=", 1) for word in words)
    steps, seeds = int(options.get("steps", STEPS)), SEEDS[: int(options.get("seeds", len(SEEDS)))]
    by_position: dict[str, list[list[float]]] = {}
    needles: dict[tuple[str, int], list[dict[float, float]]] = {}
    ledgers: list[str] = []
    for seed in seeds if "steps" not in options else seeds[:1]:
        with tempfile.TemporaryDirectory(prefix="bench_long_context_") as name:
            models, ledger = one_seed(Path(name), seed, steps, steps * MORE_STEPS // STEPS)
            ledgers += [line.partition(": ")[2] for line in ledger]
        for label, model in models.items():
            by_position.setdefault(label, []).append(loss_by_position(model, 1000 + seed))
            print(label, seed, [round(loss, 3) for loss in by_position[label][-1]], flush=True)
            for length, depth, share in found_needles(model, 2000 + seed):
                rows = needles.setdefault((label, length), [])
                if depth == DEPTHS[0]:
                    rows.append({})
                rows[-1][depth] = share
            print(label, seed, {length: needles[label, length][-1] for length in LENGTHS}, flush=True)
        by_position.setdefault("a reader who remembers everything", []).append(perfect_reader(1000 + seed))
    rows = [
        {"model": label, "length": length, **summary(found)} for (label, length), found in needles.items()
    ]  # fmt: skip
    positions = [
        {"model": label, **{f"to_{(n + 1) * BIN}": mean(each[n] for each in found) for n in range(LONG // BIN)}}
        for label, found in by_position.items()
    ]
    if "steps" in options:
        return
    results = {
        "title": "From 512 tokens to 4,096: the loss by position, and needles",
        "about": " ".join((__doc__ or "").split("\n\n", 2)[2].split()) + f" {len(seeds)} seeds.",
        "rows": rows,
        "tables": [{"title": "Loss of a value in nats, by position: mean over seeds", "rows": positions}],
        "lost": "",
        "ledgers": ledgers,
        "raw": {"loss_by_position": by_position},
    }
    write_results("long_context", results, packages=("torch",))


def summary(found: list[dict[float, float]]) -> dict[str, float]:
    """The share found at each depth, mean over seeds, and of all."""
    by_depth = {f"found_at_depth_{depth:g}": mean(each[depth] for each in found) for depth in DEPTHS}
    return {**by_depth, "found": mean(by_depth.values())}


if __name__ == "__main__":
    main(sys.argv[1:])
