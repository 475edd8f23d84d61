"""The small language models that the fine-tuning benchmarks begin with: one that is pretrained here, and stories260K.

    python -m bench.finetune.base_model data=FOLDER work_dir=FOLDER     some 20 minutes on one idle core

`data` holds classify/sst2/train.tsv, lm/war-and-peace/wap.{train,valid,test}.txt, lm/wikitext-2/{valid,test}.txt and
model/{stories260K,tok512}.bin. Everything is made by the tools as a user calls them; what is finished is not made again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megagpt.measurement import PROJECT
from megagpt.monitor.metrics import read_metrics

MODEL = {"family": "llama", "vocab_size": 2112, "seq_len": 512, "num_layers": 4, "num_heads": 4, "hidden_size": 128}
"""1.1M parameters. 2,048 ids of SentencePiece, and room for the special tokens of chats."""
STORIES = {
    "family": "llama", "vocab_size": 512, "seq_len": 512, "num_layers": 5, "num_heads": 8, "num_kv_heads": 4,
    "hidden_size": 64, "mlp_size": 172,
}  # fmt: skip
"""stories260K, which was trained elsewhere on TinyStories."""
COMMON = {"precision": "fp32", "engine": {"kind": "fsdp"}, "monitor": {"log_every_steps": 20}}
BOOKS = (
    *(f"lm/war-and-peace/wap.{part}.txt" for part in ("train", "valid", "test")),
    *(f"lm/wikitext-2/{part}.txt" for part in ("valid", "test")),
)
UPDATES = 600
ABOUT = (
    f"A Llama of 1.1M parameters (4 blocks of 128, SentencePiece with 2,048 ids) is pretrained for {UPDATES:,} updates of "
    "2,048 tokens, seven tenths of them from War and Peace and WikiText-2, three tenths SST-2's training sentences without "
    "their labels."
)
"""What the results say of it."""


def main(words: Sequence[str]) -> None:
    """Make both."""
    options = dict(word.split("=", 1) for word in words)
    pretrain(Path(options["data"]), Path(options["work_dir"]), int(options.get("steps", UPDATES)))
    import_stories(Path(options["data"]), Path(options["work_dir"]))


def pretrain(data: Path, work: Path, updates: int = UPDATES) -> Path:
    """work/base_run, and work/base/tokenizer."""
    if (work / "base_run" / "checkpoints" / f"step_{updates:08d}" / "manifest.json").is_file():
        return work / "base_run"
    work.mkdir(parents=True, exist_ok=True)
    texts = {"books": work / "books.jsonl", "reviews": work / "reviews.jsonl"}
    if not texts["reviews"].is_file():
        write_books(data, texts["books"])
        with texts["reviews"].open("w", encoding="utf-8") as file:
            for i, line in enumerate((data / "classify/sst2/train.tsv").read_text("utf-8").splitlines()):
                file.write(json.dumps({"id": f"sst2:{i}", "text": line.split("\t")[0], "source": "reviews"}) + "\n")
    both = f"[{','.join(map(str, texts.values()))}]"
    tool("train_tokenizer", f"work_dir={work / 'base'}", f"tokenizer.inputs={both}", "tokenizer.vocab_size=2048")
    for name, path in texts.items():
        tool(
            "tokenize_documents", f"work_dir={work / name}", "num_workers=1", f"tokenize.inputs=[{path}]",
            f"tokenize.tokenizer={work / 'base' / 'tokenizer'}", "tokenize.validation_fraction=0.02",
        )  # fmt: skip
    sources = {name: {"path": str(work / name / "shards"), "weight": 0.7 if name == "books" else 0.3} for name in texts}
    train(
        work / "base.yaml", 4, run_dir=str(work / "base_run"), max_steps=updates, model=MODEL,
        data={"seq_len": 512, "sources": sources}, optim={"lr": 3e-3, "schedule": {"warmup_steps": min(100, updates - 1)}},
        evaluate_every_steps=300, evaluate_max_samples=20, save_every_steps=300,
    )  # fmt: skip
    return work / "base_run"


def write_books(data: Path, path: Path) -> None:
    """Four long lines are a document."""
    with path.open("w", encoding="utf-8") as file:
        for name in BOOKS:
            text = (data / name).read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 40]
            for i in range(0, len(lines), 4):
                file.write(json.dumps({"id": f"{name}:{i}", "text": "\n".join(lines[i : i + 4]), "source": "books"}) + "\n")


def import_stories(data: Path, work: Path) -> Path:
    """work/stories_run."""
    folder = data / "model"
    if not (work / "stories_run").is_dir():
        tool(
            "import_model", f"source={folder / 'stories260K.bin'}", f"tokenizer={folder / 'tok512.bin'}",
            f"run_dir={work / 'stories_run'}",
        )  # fmt: skip
    return work / "stories_run"


def train(path: Path, samples: int, **settings: Any) -> None:
    """tools/train_model.py, until it is done; `samples` per update. A run that is done is left alone."""
    if is_done(Path(settings["run_dir"]), settings["max_steps"]):
        return
    sizes = {"global_batch_size": samples, "micro_batch_size": samples}
    path.write_text(yaml.safe_dump({**COMMON, **sizes, **settings}))
    tool("train_model", str(path))


def is_done(run_dir: Path, updates: int) -> bool:
    """Whether the run has ended by itself: after `updates`, or by early stopping."""
    done = read_metrics(run_dir).of_kind("done") if (run_dir / "metrics.jsonl").is_file() else []
    return bool(done) and (done[-1]["step"] == updates or bool(done[-1].get("early_stop")))


def tool(name: str, *words: str) -> None:
    """One of the tools, on one thread."""
    command = [sys.executable, str(PROJECT / "tools" / f"{name}.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(sys.argv[1:])
