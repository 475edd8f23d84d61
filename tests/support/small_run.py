"""A small run as a user starts it: shards of two-letter text, settings, tools/train_model.py on some ranks."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ranks import Ranks, wait_until

from megagpt.command import EXIT_STOPPED
from megagpt.data.sample_ledger import read_ledger
from megagpt.data.shards import Manifest, ShardWriter, write_manifest
from megagpt.monitor.metrics import read_metrics
from megagpt.tokenizer.open_tokenizer import open_tokenizer

STEPS = 24
STARTED: list[Ranks] = []
"""What start() started; a test's fixture ends it."""


def write_shards(root: Path, letters: tuple[str, ...] = ("ab", "ba", " "), seed: int = 0) -> Path:
    """A source of two-letter text that a tiny model can learn, tokenized as bytes, with train/, validation/, tokenizer/."""
    tokenizer, rng = open_tokenizer("bytes"), np.random.default_rng(seed)
    for split, documents in (("train", 60), ("validation", 6)):
        with ShardWriter(root / split, "shard_00000", np.dtype("uint16")) as writer:
            for i in range(documents):
                text = "".join(rng.choice(letters, 60))
                tokens = np.array([*tokenizer.encode(text), tokenizer.eot_id], dtype=np.uint32)
                writer.add(tokens, id=f"doc:{i}", source="toy", text_bytes=len(text))
            info = writer.close()
        manifest = Manifest(split, "uint16", 257, tokenizer.eot_id, tokenizer.fingerprint, "", (info,))
        write_manifest(root / split, manifest)
    tokenizer.save(root / "tokenizer")
    return root


def settings(shards: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A complete small run; `changes` replace top-level fields."""
    model = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32, "dropout": 0.1}
    warmup_steps = min(4, changes.get("max_steps", STEPS) - 1)
    return {
        "run_dir": str(run_dir),
        "max_steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "model": model,
        "data": {"seq_len": 32, "shuffle_block": 4, "sources": {"toy": {"path": str(shards)}}},
        "optim": {"lr": 1e-3, "schedule": {"warmup_steps": warmup_steps}},
        "engine": {"zero_stage": 1},
        "monitor": {"log_every_steps": 1},
        "evaluate_every_steps": 8,
        "save_every_steps": 4,
        **changes,
    }


def start(project: Path, folder: Path, values: dict[str, Any], size: int = 2, *words: str) -> Ranks:
    """tools/train_model.py on some ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    STARTED.append(Ranks([str(project / "tools" / "train_model.py"), str(folder / "run.yaml"), *words], size, folder / "logs"))
    return STARTED[-1]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir).of_kind("train")}


def stop_one_of_two(ranks: Ranks, run_dir: Path) -> int:
    """Send SIGTERM to the second of two ranks after some steps; both stop. Returns how many steps the ledger then has."""
    wait_until(lambda: len(read_ledger(run_dir)) >= 6)
    ranks.send(signal.SIGTERM, [1])
    assert ranks.wait() == [EXIT_STOPPED] * 2, ranks.output()
    return len(read_ledger(run_dir))
