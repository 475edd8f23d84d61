"""Fine-tuning steps on CPU side by side with transformers' Trainer, peft and litgpt: losses, CPU seconds per step, memory.

    python -m bench.finetune.compare data=FOLDER work_dir=FOLDER     three repetitions, some 20 minutes on one core
    python -m bench.finetune.compare data=FOLDER work_dir=FOLDER cells=lora    this cell anew; the other stays in the result
    python -m bench.finetune.compare work_dir=FOLDER short=true      a tiny model and ours alone, to see that it works

All begin with one folder in transformers' format: export_model has written it of the model that bench/finetune/base_model.py
pretrains (or of `base=RUN`, another one), ours opens it by import_model, litgpt by its own converter. All take the same rows in
the same order: GSM8K's questions and answers as chats (ChatML, loss on the answers alone), each padded to 256 tokens, 4 to an
update. Same fused AdamW, clipping at 1, cosine schedule, fp32, one process, one thread; LoRA of rank 8 beside all matrices of
the blocks with the same first factors. Contenders of a cell take turns on the cores in slices of 2 s
(bench/training/turns.py). Ratios are to MegaGPT's time in the same repetition, medians over the steps after the first. Memory
over import is the peak of resident memory less what was resident when the libraries had been imported. Losses are those of each
step before its update.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.finetune.base_model import pretrain, tool, train
from bench.measure import peer_python, peer_versions
from bench.training.compare import TORCH, contender, earlier_tables
from bench.training.turns import Outcome, run_turn_about
from bench.training.write_data import write_source
from megagpt.checkpoint.load_model import load_model
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.data.open_data import DataConfig, open_data
from megagpt.documents import IGNORE
from megagpt.engine.build import whole_shapes
from megagpt.measurement import PROJECT, spread, write_results
from megagpt.model.gpt import ModelConfig
from megagpt.model.tune import LORA_A, LoraConfig, TuneConfig, initial_adapter
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer

PEERS: dict[str, tuple[str, ...]] = {
    "peft": (TORCH, "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "numpy==2.4.6"),
    "litgpt": (TORCH, "litgpt==0.5.13", "numpy==2.4.6", "requests"),
}
OURS = "megagpt"
CELLS: dict[str, tuple[str, dict[str, str], dict[str, Any] | None, float]] = {
    "lora": (
        "LoRA of rank 8 beside all matrices",
        {OURS: "megagpt", "transformers Trainer + peft": "peft", "litgpt": "litgpt"},
        {"rank": 8, "alpha": 16},
        2e-3,
    ),
    "all": ("All weights", {OURS: "megagpt", "transformers Trainer": "peft"}, None, 5e-4),
}
"""Name -> title, contenders and their programs, adapters, peak learning rate."""
SEQ_LEN, SAMPLES, STEPS, SEED = 256, 4, 60, 1
TEMPLATE_IDS = 40
"""More than ChatML adds to question and answer."""
SHOWN_STEPS = (1, 2, 5, 10, 20, 30, 40, 50, 60)
TINY = {"family": "llama", "vocab_size": 320, "seq_len": SEQ_LEN, "num_layers": 2, "num_heads": 2, "hidden_size": 32}
SCHEDULE_NOTE = (
    "litgpt clips no gradients while fine-tuning, and its schedule gives the first update a rate of 0: both are put in from "
    "outside. It unties the embedding and the head, so that it is no contender where all weights are trained."
)


def main(words: Sequence[str]) -> None:
    """Run the cells and write the result."""
    options = dict(word.split("=", 1) for word in words)
    short = options.get("short") == "true"
    repetitions, steps = (1, 4) if short else (int(options.get("repetitions", 3)), int(options.get("steps", STEPS)))
    work = Path(options["work_dir"])
    work.mkdir(parents=True, exist_ok=True)
    if short:
        base, rows, format_name = tiny_base(work), PROJECT / "bench/finetune/dialogues.jsonl", "dialogue_summary"
    else:
        base = Path(options["base"]) if "base" in options else pretrain(Path(options["data"]), work)
        rows, format_name = work / "gsm8k_short.jsonl", "question_answer"
        write_short_rows(Path(options["data"]) / "sft/gsm8k/train.jsonl", open_tokenizer(str(base / "tokenizer")), rows)
    job = prepare_job(base, rows, format_name, work / "compare", steps)
    before = {} if short or steps != STEPS else earlier_tables("finetune_compare")
    measured: dict[str, dict[str, Any]] = {}
    for key in options.get("cells", ",".join(CELLS)).split(","):
        title, contenders, lora, rate = CELLS[key]
        chosen = {OURS: contenders[OURS]} if short else contenders
        outcomes = run_cell({**job, "lora": lora, "lr": rate}, chosen, repetitions)
        found = [row_of(name, outcomes) for name in outcomes]
        curves = {name: outcomes[name][0].ranks[0]["losses"] for name in outcomes}
        about = f"Measured {datetime.now(UTC).date().isoformat()}, repetitions of {steps} steps: {repetitions}."
        measured[key] = {"key": key, "title": title, "about": about, "rows": found, "losses": curves}
        measured[f"{key}_curve"] = {
            "key": f"{key}_curve", "title": f"{title}: loss", "about": "", "rows": curve_rows(curves)
        }  # fmt: skip
        print(json.dumps(found, indent=1), flush=True)
    if short or steps != STEPS:
        return
    both = {**before, **measured}
    tables = [both[name] for key in CELLS for name in (key, f"{key}_curve") if name in both]
    versions: dict[str, str] = {}
    for name, requirements in PEERS.items():
        versions |= peer_versions(peer_python(name, requirements), [r.split("==")[0] for r in requirements if "==" in r])
    results = {
        "title": "Fine-tuning: side by side with Trainer, peft and litgpt",
        "about": " ".join((__doc__ or "").split("\n\n")[2].split()) + " " + SCHEDULE_NOTE,
        "tables": tables,
        "lost": lost(tables),
    }
    write_results("finetune_compare", results, packages=("torch",), peers=versions)


def tiny_base(work: Path) -> Path:
    """A model of two updates on bytes."""
    if not (work / "base_run" / "checkpoints").is_dir():
        write_source(work / "bytes", 100 * SEQ_LEN)
        train(
            work / "tiny.yaml", 2, run_dir=str(work / "base_run"), max_steps=2, model=TINY,
            data={"seq_len": SEQ_LEN, "sources": {"main": {"path": str(work / "bytes")}}},
        )  # fmt: skip
    return work / "base_run"


def write_short_rows(source: Path, tokenizer: Tokenizer, path: Path) -> None:
    """The rows that fit a sample whole."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lengths = [len(tokenizer.encode(row["question"])) + len(tokenizer.encode(row["answer"])) for row in rows]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length + TEMPLATE_IDS <= SEQ_LEN]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def prepare_job(base: Path, rows: Path, format_name: str, folder: Path, steps: int) -> dict[str, Any]:
    """The folder all begin with, the run that is imported from it, shards, plain rows and LoRA's first factors."""
    folder.mkdir(exist_ok=True)
    if not (folder / "start_run").is_dir():
        # The special tokens of chats come with a first tuning, of one update; its export has their rows and its tokenizer.
        write_chats(rows, format_name, base / "tokenizer", folder / "chats_of_base")
        found = load_model(base).model_config
        model = {**found.model_dump(mode="json"), "vocab_size": max(found.vocab_size, 320)}
        source = {"path": str(folder / "chats_of_base" / "shards")}
        train(
            folder / "first.yaml", 2, run_dir=str(folder / "first_run"), max_steps=1, model=model, init_from=str(base),
            data={"seq_len": SEQ_LEN, "shuffle_block": 1, "sources": {"main": source}},
        )  # fmt: skip
        export_model(ExportConfig(run_dir=folder / "first_run", output_dir=folder / "start", dtype="fp32"))
        import_model(ImportConfig(source=folder / "start", run_dir=folder / "start_run"))
        write_chats(rows, format_name, folder / "start_run" / "tokenizer", folder / "chats")
    model = load_model(folder / "start_run").model_config
    write_rows(folder, steps)
    write_first_factors(model, folder / "first_factors.pt")
    return {
        "model": {**model.model_dump(mode="json"), "mlp_size": model.mlp_size}, "precision": "fp32", "compile": False,
        "steps": steps, "seq_len": SEQ_LEN, "micro_batch_size": SAMPLES, "micro_batches": 1, "weight_decay": 0.1,
        "seed": SEED, "log_every_steps": 1, "save": False, "resumed_at": 0, "device": "cpu", "schedule": "cosine",
        "shards": str(folder / "chats" / "shards"), "inputs": str(folder / "inputs.npy"),
        "labels": str(folder / "labels.npy"), "start_folder": str(folder / "start"),
        "start_run": str(folder / "start_run"), "first_factors": str(folder / "first_factors.pt"),
    }  # fmt: skip


def write_chats(rows: Path, format_name: str, tokenizer: Path, folder: Path) -> None:
    """Rows to shards, one to a sample."""
    tool(
        "tokenize_documents", f"work_dir={folder}", "num_workers=1", f"tokenize.inputs=[{rows}]",
        f"tokenize.tokenizer={tokenizer}", f"tokenize.pack_seq_len={SEQ_LEN}", "tokenize.validation_fraction=0",
        "tokenize.overlap_threshold=null", f"tokenize.supervised.format={format_name}", "tokenize.supervised.padding=padded",
    )  # fmt: skip


def write_rows(folder: Path, steps: int) -> None:
    """The samples in our order as plain arrays; a label stands at the place of its own id."""
    settings = {"seq_len": SEQ_LEN, "shuffle_block": 1, "sources": {"main": {"path": str(folder / "chats" / "shards")}}}
    data = open_data(DataConfig.model_validate(settings)).train
    samples = [data.sample(index) for index in range(steps * SAMPLES)]
    inputs, targets = np.stack([s.inputs for s in samples]), np.stack([s.targets for s in samples])
    if (targets[:, -1] != IGNORE).any():
        raise SystemExit("a row fills its sample: its last target has no place among the labels")
    labels = np.full_like(targets, -100)
    labels[:, 1:] = np.where(targets[:, :-1] == IGNORE, -100, targets[:, :-1])
    if not (labels[labels != -100] == inputs[labels != -100]).all():
        raise SystemExit("a target is not the id that follows")
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)


def write_first_factors(model: ModelConfig, path: Path) -> None:
    """A of every layer as our run draws it."""
    tune = TuneConfig(lora=LoraConfig(rank=8, alpha=16, targets=("*",)))
    shapes = whole_shapes(model, tune)
    names = [name for name in shapes if name.endswith(LORA_A)]
    torch.save({name.removesuffix(f".{LORA_A}"): initial_adapter(name, shapes[name], SEED) for name in names}, path)


def run_cell(job: dict[str, Any], contenders: Mapping[str, str], repetitions: int) -> dict[str, list[Outcome]]:
    """All contenders turn about; raises SystemExit if one fails."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for number in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="bench_finetune_") as folder:
            programs = [
                contender(name, program, "fsdp", 1, job, Path(folder), peers=PEERS, package="bench.finetune.peers")
                for name, program in contenders.items()
            ]
            seen, failures = run_turn_about(programs, Path(folder) / "runs", timeout_s=1800)
        if failures:
            raise SystemExit("\n".join(f"{name} failed: {reason}" for name, reason in failures.items()))
        for name, outcome in seen.items():
            outcomes[name].append(outcome)
        print(f"repetition {number + 1} of {repetitions} done", flush=True)
    return outcomes


def row_of(name: str, outcomes: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """One contender against ours."""
    mine, ours = outcomes[name], outcomes[OURS]
    seen, wanted = mine[0].ranks[0]["losses"], ours[0].ranks[0]["losses"]
    if not (len(seen) == len(wanted) and all(map(math.isfinite, seen))):
        raise SystemExit(f"{name}: {len(seen)} losses, ours {len(wanted)}: {seen}")
    ratios = [median(a.step_cpu_s()) / median(b.step_cpu_s()) for a, b in zip(mine, ours, strict=True)]
    peaks = [outcome.ranks[0]["peak_rss_bytes"] for outcome in mine]
    over = [outcome.ranks[0]["peak_rss_bytes"] - outcome.ranks[0]["imported_rss_bytes"] for outcome in mine]
    return {
        "contender": name,
        "step_cpu_s": median(median(outcome.step_cpu_s()) for outcome in mine),
        "time_ratio_to_megagpt": spread(ratios),
        "first_step_after_cpu_s": median(outcome.start_cpu_s for outcome in mine),
        "peak_memory_mib": median(peaks) / 2**20,
        "memory_over_import_mib": median(over) / 2**20,
        "first_loss": seen[0],
        "last_loss": seen[-1],
        "largest_loss_difference_to_megagpt": max(abs(a - b) for a, b in zip(seen, wanted, strict=True)),
    }


def curve_rows(losses: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Some steps of every curve."""
    steps = [step for step in SHOWN_STEPS if step <= len(losses[OURS])]
    return [{"step": str(step), **{f"{name}_loss": seen[step - 1] for name, seen in losses.items()}} for step in steps]


def lost(tables: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for each time and memory that a peer has less of."""
    sentences = []
    for table in tables:
        rows = {row["contender"]: row for row in table["rows"] if "contender" in row}
        for name, row in rows.items():
            if name != OURS and row["time_ratio_to_megagpt"]["median"] < 1:
                share = 100 * (1 - row["time_ratio_to_megagpt"]["median"])
                sentences.append(f"{table['title']}: {name} takes {share:.1f} % less CPU time per step.")
            if name != OURS and row["peak_memory_mib"] < rows[OURS]["peak_memory_mib"]:
                less = rows[OURS]["peak_memory_mib"] - row["peak_memory_mib"]
                sentences.append(f"{table['title']}: {name} has a peak {less:.0f} MiB lower.")
    return " ".join(sentences)


if __name__ == "__main__":
    main(sys.argv[1:])
