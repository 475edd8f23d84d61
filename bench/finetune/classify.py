"""Classifiers of film reviews (SST-2): small pretrained models, and the same models with random weights.

    python -m bench.finetune.classify data=FOLDER work_dir=FOLDER            some 25 minutes on one idle core
    python -m bench.finetune.classify data=FOLDER work_dir=FOLDER models=stories    of one model; a result wants both
    python -m bench.finetune.classify data=FOLDER work_dir=FOLDER steps=2 models=stories    to see that it works

`data` is what bench/finetune/base_model.py reads, with classify/sst2/test.tsv. Everything is made by the tools as a user calls
them; what is finished in work_dir is not made again.

Two models: ABOUT_BASE And stories260K (0.26M parameters), which others trained on TinyStories, imported. Each gets a last layer
for two classes and is tuned on SST-2's training sentences, all of them (5 % held out for validation, 100 updates of 2,048
tokens) or every 23rd (301, of which a fifth is held out; 40 updates of 1,024 tokens). The same model with random weights is
trained on the same rows in the same order with the same settings. Scores are those of evaluate_model on SST-2's 1,821 test
sentences, which nothing else has seen, at each run's best checkpoint by validation loss. A row is the mean over the seeds of
`runs` (order of the rows, weights of the new layer, all weights of random ones), with the smallest and the largest accuracy.
"""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.finetune.base_model import ABOUT, import_stories, pretrain, tool, train
from megagpt.checkpoint.load_model import load_model
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run
from megagpt.files import read_json, write_json
from megagpt.measurement import write_results
from megagpt.monitor.metrics import read_metrics

CLASSES = ("negative", "positive")
LABELS = {"0": "negative", "1": "positive"}
SCARCE_EVERY = 23


@dataclass(frozen=True, slots=True)
class Size:
    """How much of the training rows a run has."""

    name: str
    updates: int
    samples: int
    held_out: float
    seeds: dict[str, int]
    """Of each model, how many."""


SIZES = {
    "all": Size("all", 100, 16, 0.05, {"base": 1, "stories": 1}),
    "scarce": Size("301", 40, 8, 0.2, {"base": 1, "stories": 1}),
}
MODELS = {"base": "pretrained here, 1.1M", "stories": "stories260K, 0.26M"}


def main(words: Sequence[str]) -> None:
    """Make all runs, score them, write the table."""
    options = dict(word.split("=", 1) for word in words)
    data, work = Path(options["data"]), Path(options["work_dir"])
    work.mkdir(parents=True, exist_ok=True)
    models = options.get("models", ",".join(MODELS)).split(",")
    lines = (data / "classify/sst2/train.tsv").read_text("utf-8").splitlines()
    (work / "sst_scarce.tsv").write_text("\n".join(lines[::SCARCE_EVERY]) + "\n", encoding="utf-8")
    runs = []
    for model in models:
        steps = int(options["steps"]) if "steps" in options else None
        begin = import_stories(data, work) if model == "stories" else pretrain(data, work)
        write_shards(data, work, model, begin / "tokenizer")
        for size in SIZES:
            for seed in range(1, 1 + SIZES[size].seeds[model]):
                for pretrained in (True, False):
                    runs.append(one_run(work, model, size, seed, begin, pretrained=pretrained, fewer=steps))
                    print(json.dumps(runs[-1]), flush=True)
    rows = [majority(data, lines), *(summary(runs, model, size, tuned) for model in models for size in SIZES
            for tuned in (True, False))]  # fmt: skip
    print(json.dumps(rows, indent=1))
    if "steps" in options or len(models) < len(MODELS):
        return
    about = " ".join((__doc__ or "").split("\n\n")[3].split()).replace("ABOUT_BASE", ABOUT)
    about = f"{about} {options.get('note', '')}".strip()
    results = {"title": "Fine-tuning: classifiers of film reviews", "about": about, "rows": rows, "runs": runs}
    write_results("finetune_classify", {**results, "lost": lost(rows)}, packages=("torch",))


def write_shards(data: Path, work: Path, model: str, tokenizer: Path) -> None:
    """Shards of all rows, the scarce ones and the test sentences, by the model's tokenizer."""
    sst2 = data / "classify" / "sst2"
    inputs = {"all": sst2 / "train.tsv", "scarce": work / "sst_scarce.tsv", "test": sst2 / "test.tsv"}
    for name, path in inputs.items():
        if (work / f"sst_{model}_{name}" / "shards").is_dir():
            continue
        tool(
            "tokenize_documents", f"work_dir={work / f'sst_{model}_{name}'}", "num_workers=1", "tokenize.pack_seq_len=128",
            f"tokenize.inputs=[{path}]", f"tokenize.tokenizer={tokenizer}",
            f"tokenize.validation_fraction={SIZES[name].held_out if name in SIZES else 0}",
            "tokenize.supervised.format=text_label", "tokenize.supervised.template=plain",
            f"tokenize.supervised.labels={json.dumps(LABELS)}", f"tokenize.supervised.classes={json.dumps(CLASSES)}",
            f"tokenize.require_lossless={'false' if model == 'stories' else 'true'}",  # a tokenizer of others
        )  # fmt: skip


def one_run(
    work: Path, model: str, size: str, seed: int, begin: Path, *, pretrained: bool, fewer: int | None
) -> dict[str, Any]:
    """Train and score one; kept in the run's folder."""
    chosen = SIZES[size]
    updates = fewer or chosen.updates
    run_dir = work / f"sst_{model}_{size}_{'tuned' if pretrained else 'random'}_{seed}"
    if not (run_dir / "sst2.json").is_file():
        config = load_model(begin).model_config.model_dump(mode="json")
        every = max(1, updates // 4)
        train(
            work / f"{run_dir.name}.yaml", chosen.samples, run_dir=str(run_dir), max_steps=updates, seed=seed,
            model={**config, "dropout": 0.1, "classes": CLASSES}, init_from=str(begin) if pretrained else None,
            data={"seq_len": 128, "shuffle_block": 1, "document_mask": True,
                  "sources": {"sst2": {"path": str(work / f"sst_{model}_{size}" / "shards")}}},
            optim={"lr": 1e-3, "weight_decay": 0.01, "schedule": {"kind": "linear", "warmup_steps": updates // 10}},
            evaluate_every_steps=every, save_every_steps=every,
        )  # fmt: skip
        write_json(run_dir / "sst2.json", scores(run_dir, work / f"sst_{model}_test" / "shards" / "train"))
    return {"model": model, "rows": size, "pretrained": pretrained, "seed": seed, **read_json(run_dir / "sst2.json")}


def scores(run_dir: Path, test: Path) -> dict[str, Any]:
    """On the test sentences, at the best checkpoint."""
    found = evaluate_run(EvaluateConfig(run_dir=run_dir, step="best", shards={"test": test}, micro_batch_size=32))
    by_class = found.sources["test"].class_scores()
    best = read_json(run_dir / "checkpoints" / "best.json")
    return {
        "accuracy": by_class["classes"]["accuracy"],
        **{f"f1_{name}": by_class[f"classes.{name}"]["f1"] for name in CLASSES},
        "best_step": best["step"],
        "validation_loss": best["validation_loss"],
        "updates": read_metrics(run_dir).of_kind("done")[-1]["step"],
    }


def majority(data: Path, lines: Sequence[str]) -> dict[str, Any]:
    """The label that most training rows have, for every test sentence."""
    [(most, _)] = Counter(line.split("\t")[1] for line in lines).most_common(1)
    gold = [line.split("\t")[1] for line in (data / "classify/sst2/test.tsv").read_text("utf-8").splitlines()]
    share = gold.count(most) / len(gold)
    f1 = {f"f1_{word}": 2 * share / (1 + share) if label == most else 0.0 for label, word in LABELS.items()}
    return {"model": f"always {LABELS[most]}", "training_rows": "", "weights": "", "runs": None,
            "accuracy": {"median": share, "min": share, "max": share}, **f1, "standard_error": None}  # fmt: skip


def summary(runs: Sequence[dict[str, Any]], model: str, size: str, pretrained: bool) -> dict[str, Any]:
    """The mean over the seeds."""
    mine = [run for run in runs if (run["model"], run["rows"], run["pretrained"]) == (model, size, pretrained)]
    accuracies = [run["accuracy"] for run in mine]
    mean = fmean(accuracies)
    return {
        "model": MODELS[model],
        "training_rows": SIZES[size].name,
        "weights": "pretrained" if pretrained else "random",
        "runs": len(mine),
        "accuracy": {"median": mean, "min": min(accuracies), "max": max(accuracies)},
        **{f"f1_{name}": fmean(run[f"f1_{name}"] for run in mine) for name in CLASSES},
        "standard_error": (mean * (1 - mean) / 1821) ** 0.5,
    }


def lost(rows: Sequence[dict[str, Any]]) -> str:
    """Where pretrained weights are not ahead of random ones by more than two standard errors of the difference."""
    found = []
    for tuned, random in itertools.pairwise(rows):
        if (tuned["weights"], random["weights"]) == ("pretrained", "random"):
            ahead = tuned["accuracy"]["median"] - random["accuracy"]["median"]
            if ahead < 2 * math.hypot(tuned["standard_error"], random["standard_error"]):
                found.append(f"{tuned['model']}, {tuned['training_rows']} rows: {ahead:+.3f}")
    return "Pretraining does not clearly help: " + "; ".join(found) + "." if found else ""


if __name__ == "__main__":
    main(sys.argv[1:])
