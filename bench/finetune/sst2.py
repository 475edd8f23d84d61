"""Sentiment of film reviews (SST-2): a small model that is pretrained here and then tuned, against the same model from scratch.

    python bench/finetune/sst2.py data=FOLDER work_dir=FOLDER            some 20 minutes on one idle core
    python bench/finetune/sst2.py data=FOLDER work_dir=FOLDER steps=10   to see that it works; writes nothing
    python bench/finetune/sst2.py data=FOLDER work_dir=FOLDER score=true  only score the finished runs; note=TEXT adds
                                                                          to the result how they came about

`data` holds classify/sst2/{train,test}.tsv, lm/war-and-peace/wap.train.txt and lm/wikitext-2/{valid,test}.txt. Everything is
made by the tools as a user calls them; what is finished in work_dir is not made again.

A Llama of 1.1M parameters (4 blocks of 128, SentencePiece with 2,048 ids) is pretrained for 420 updates of 4,096 tokens on War
and Peace, WikiText-2 and the training sentences without their labels. Then it is tuned on SST-2's 6,919 training sentences as
chats (ChatML, two new special tokens, 5 % of the rows held out for validation), and the same model with random weights is
trained on the same rows in the same order with the same settings: 100 updates of 16 samples. A third run is tuned for 400
updates of 32 samples at half the rate. Accuracy is on SST-2's 1,820 test sentences, which nothing else has seen: the likelier
of the two labels behind the prompt, at each run's best checkpoint by validation loss. One run each.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megagpt.checkpoint.load_model import load_model
from megagpt.corpus.packing.config import SupervisedConfig
from megagpt.corpus.packing.supervised import RowEncoder
from megagpt.evaluate.likelihood import LikelihoodRequest, log_likelihoods
from megagpt.files import read_json, write_json
from megagpt.measurement import PROJECT, write_results
from megagpt.monitor.metrics import read_metrics

LABELS = {"0": "negative", "1": "positive"}
MODEL = {"family": "llama", "vocab_size": 2112, "seq_len": 128, "num_layers": 4, "num_heads": 4, "hidden_size": 128}
COMMON = {"precision": "fp32", "engine": {"kind": "fsdp"}}
RUNS = {
    "sst_scratch": ("from scratch", False, 100, 16, 1e-3),
    "sst_tuned": ("pretrained here, tuned", True, 100, 16, 1e-3),
    "sst_tuned_long": ("pretrained here, tuned for longer", True, 400, 32, 5e-4),
}
"""Folder -> name, whether it begins with the pretrained weights, updates, samples per update, peak learning rate."""


def main(words: Sequence[str]) -> None:
    """Make all three runs, score them, write the table."""
    options = dict(word.split("=", 1) for word in words)
    data, work = Path(options["data"]), Path(options["work_dir"])
    work.mkdir(parents=True, exist_ok=True)
    if options.get("score") != "true":
        pretrain(data, work, int(options.get("steps", 420)))
        tune(data, work, int(options["steps"]) if "steps" in options else None)
    test = [line.split("\t") for line in (data / "classify" / "sst2" / "test.tsv").read_text("utf-8").splitlines()]
    rows = [majority(data, test)]
    for run, (name, *_) in RUNS.items():
        rows.append({"model": name, **score(work / run, test)})
    print(json.dumps(rows, indent=1))
    if "steps" in options:
        return
    about = " ".join((__doc__ or "").split("\n\n")[3].split())
    about = f"{about} {options.get('note', '')}".strip()
    results = {"title": "Fine-tuning: sentiment of film reviews", "about": about, "rows": rows, "lost": ""}
    write_results("finetune_sst2", results, packages=("torch",))


def pretrain(data: Path, work: Path, steps: int) -> None:
    """work/base_run: the model before it is tuned."""
    if not (work / "base.jsonl").is_file():
        with (work / "base.jsonl").open("w", encoding="utf-8") as file:
            for name in ("lm/war-and-peace/wap.train.txt", "lm/wikitext-2/valid.txt", "lm/wikitext-2/test.txt"):
                text = (data / name).read_text(encoding="utf-8", errors="replace")
                lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 40]
                for i in range(0, len(lines), 4):
                    row = {"id": f"{name}:{i}", "text": "\n".join(lines[i : i + 4]), "source": "books"}
                    file.write(json.dumps(row) + "\n")
            for i, line in enumerate((data / "classify/sst2/train.tsv").read_text("utf-8").splitlines()):
                file.write(json.dumps({"id": f"sst2:{i}", "text": line.split("\t")[0], "source": "reviews"}) + "\n")
    base, inputs = f"work_dir={work / 'base'}", f"[{work / 'base.jsonl'}]"
    tool("train_tokenizer", base, f"tokenizer.inputs={inputs}", "tokenizer.vocab_size=2048")
    tool("tokenize_documents", base, "num_workers=1", f"tokenize.inputs={inputs}", "tokenize.validation_fraction=0.02")
    train(
        work / "base.yaml", 32, run_dir=str(work / "base_run"), max_steps=steps, model=MODEL,
        data={"seq_len": 128, "sources": {"base": {"path": str(work / "base" / "shards")}}},
        optim={"lr": 3e-3, "schedule": {"warmup_steps": min(50, steps - 1)}},
        evaluate_every_steps=250, evaluate_max_samples=100, save_every_steps=250,
    )  # fmt: skip


def tune(data: Path, work: Path, fewer_steps: int | None) -> None:
    """The RUNS."""
    tool(
        "tokenize_documents", f"work_dir={work / 'sst'}", "num_workers=1", "tokenize.pack_seq_len=128",
        f"tokenize.inputs=[{data / 'classify' / 'sst2' / 'train.tsv'}]", f"tokenize.tokenizer={work / 'base' / 'tokenizer'}",
        "tokenize.validation_fraction=0.05", "tokenize.supervised.format=text_label",
        f"tokenize.supervised.labels={json.dumps(LABELS)}",
    )  # fmt: skip
    source = {"path": str(work / "sst" / "shards")}
    for run, (_, pretrained, updates, samples, rate) in RUNS.items():
        steps = fewer_steps or updates
        often = {"evaluate_every_steps": max(1, steps // (4 if updates == 100 else 10))}
        train(
            work / f"{run}.yaml", samples, run_dir=str(work / run), max_steps=steps, model={**MODEL, "dropout": 0.1},
            data={"seq_len": 128, "shuffle_block": 1, "document_mask": True, "sources": {"sst2": source}},
            optim={"lr": rate, "schedule": {"warmup_steps": min(updates // 10 if updates == 100 else 20, steps - 1)}},
            init_from=str(work / "base_run") if pretrained else None, evaluate_max_samples=64 if updates == 100 else None,
            save_every_steps=often["evaluate_every_steps"], early_stop_evaluations=0 if updates == 100 else 3, **often,
        )  # fmt: skip


def majority(data: Path, test: list[list[str]]) -> dict[str, Any]:
    """The label that most training rows have, for every sentence."""
    labels = Counter(line.split("\t")[1] for line in (data / "classify/sst2/train.tsv").read_text("utf-8").splitlines())
    [(most, _)] = labels.most_common(1)
    return {"model": f"always {LABELS[most]}", **metrics([most] * len(test), [row[1] for row in test]), "best_step": None,
            "validation_loss": None, "updates": None}  # fmt: skip


def score(run_dir: Path, test: list[list[str]]) -> dict[str, Any]:
    """The likelier label of every test sentence; kept in the run's folder."""
    if (run_dir / "sst2.json").is_file():
        return read_json(run_dir / "sst2.json")
    loaded = load_model(run_dir, "best")
    encoder = RowEncoder(loaded.tokenizer, SupervisedConfig(format="text_label", labels=LABELS), loaded.model_config.seq_len)
    ends = {label: (*loaded.tokenizer.encode(word), loaded.tokenizer.eos_ids[-1]) for label, word in LABELS.items()}
    requests = []
    for text, _ in test:
        prompt = tuple(encoder.prompt([{"role": "user", "content": text}]))
        requests += [LikelihoodRequest(prompt, ends[label]) for label in LABELS]
    likelihoods = log_likelihoods(
        loaded.model, loaded.model_config, requests, eot_id=loaded.tokenizer.eot_id, micro_batch_size=64
    )
    predicted = [str(int(likelihoods[2 * i + 1].nats > likelihoods[2 * i].nats)) for i in range(len(test))]
    best = read_json(run_dir / "checkpoints" / "best.json")
    found = {
        **metrics(predicted, [row[1] for row in test]),
        "best_step": best["step"],
        "validation_loss": best["validation_loss"],
        "updates": read_metrics(run_dir).of_kind("done")[-1]["step"],
    }
    write_json(run_dir / "sst2.json", found)
    return found


def metrics(predicted: Sequence[str], gold: Sequence[str]) -> dict[str, Any]:
    """Accuracy, its standard error, and F1 of each label."""
    accuracy = sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)
    row = {"accuracy": accuracy, "standard_error": (accuracy * (1 - accuracy) / len(gold)) ** 0.5}
    for label, word in LABELS.items():
        right = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        row[f"f1_{word}"] = 2 * right / max(1, predicted.count(label) + gold.count(label))
    return row


def train(path: Path, samples: int, **settings: Any) -> None:
    """tools/train_model.py, until it is done; `samples` per update."""
    sizes = {"global_batch_size": samples, "micro_batch_size": samples}
    path.write_text(yaml.safe_dump({**COMMON, **sizes, "monitor": {"log_every_steps": 20}, **settings}))
    tool("train_model", str(path))


def tool(name: str, *words: str) -> None:
    """One of the tools, on one thread."""
    command = [sys.executable, str(PROJECT / "tools" / f"{name}.py"), *words]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
