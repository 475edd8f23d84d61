"""Summaries of dialogues and GSM8K: a small pretrained model before and after tuning; early stopping; a kill and a resume.

    python -m bench.finetune.tasks data=FOLDER work_dir=FOLDER               some 10 minutes on one idle core
    python -m bench.finetune.tasks data=FOLDER work_dir=FOLDER steps=4       to see that it works, on stories260K

`data` is what bench/finetune/base_model.py reads, with sft/gsm8k/train.jsonl. What is finished in work_dir is not made again.

ABOUT_BASE Each task splits its rows: of 64 short dialogues in samsum's format (bench/finetune/dialogues.jsonl, written for this
benchmark) every fourth is for the test, of GSM8K's training file (its rows that fit 256 tokens) every hundredth. A row is a
prompt and an answer in plain text, of which the answer is learned. Summaries are tuned for 400 updates at most, with an
evaluation on a fifth of the training rows every 5 and early stopping after two without a lower loss; GSM8K for 40 updates of
2,048 tokens. Loss is on the answers of the test rows; ROUGE and final numbers are those of greedy answers to the test rows'
prompts (the first 16), by evaluate_model. GSM8K is tuned twice: the second run is killed (signal 9) after its 15th
update, which no checkpoint holds, and started again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.finetune.base_model import ABOUT, COMMON, import_stories, is_done, pretrain, tool
from megagpt.checkpoint.load_model import load_model
from megagpt.evaluate.evaluate_model import EvaluateConfig, Evaluation, evaluate_run
from megagpt.files import read_json
from megagpt.measurement import PROJECT, write_results
from megagpt.monitor.metrics import read_metrics
from megagpt.tokenizer.open_tokenizer import open_tokenizer

PROMPTS = {"summaries": "{dialogue}\nSummary:", "gsm8k": "{question}\nAnswer:"}
FORMATS = {"summaries": "dialogue_summary", "gsm8k": "question_answer"}
FIELDS = {"summaries": ("dialogue", "summary"), "gsm8k": ("question", "answer")}
TEST_EVERY = {"summaries": 4, "gsm8k": 100}
ANSWER_TOKENS = {"summaries": 30, "gsm8k": 60}
SEQ_LEN, ROW_TOKENS, ASKED, KILLED_AFTER, SAVED_EVERY = 512, 256, 16, 15, 10


def main(words: Sequence[str]) -> None:
    """Both tasks, and the run that is killed."""
    options = dict(word.split("=", 1) for word in words)
    data, work = Path(options["data"]), Path(options["work_dir"])
    work.mkdir(parents=True, exist_ok=True)
    fewer = int(options["steps"]) if "steps" in options else None
    begin = pretrain(data, work) if fewer is None else import_stories(data, work)
    found: dict[str, Evaluation] = {}
    for task in FORMATS:
        write_task(data, work, task, begin / "tokenizer", ASKED if fewer is None else 2)
        found[f"{task} before"] = evaluate(begin, work, task)
    summaries, gsm8k, killed = (work / name for name in ("tuned_summaries", "tuned_gsm8k", "tuned_gsm8k_killed"))
    often = 5 if fewer is None else 1
    tune(begin, work, "summaries", summaries, fewer or 400, samples=2, rate=1e-3, evaluate_every_steps=often,
         early_stop_evaluations=2, save_every_steps=often)  # fmt: skip
    updates, every, last = (40, SAVED_EVERY, KILLED_AFTER) if fewer is None else (fewer, 2, 3)
    tune(begin, work, "gsm8k", gsm8k, updates, samples=4, rate=1e-3, save_every_steps=every)
    resumed = kill_and_resume(begin, work, killed, updates, every, last)
    found["summaries after"], found["gsm8k after"] = evaluate(summaries, work, "summaries"), evaluate(gsm8k, work, "gsm8k")
    rows = [row_of(task, when, found[f"{task} {when}"]) for task in FORMATS for when in ("before", "after")]
    stopped, equal = stopping(summaries), {**resumed, **compare_weights(gsm8k, killed)}
    print(json.dumps([rows, stopped, equal], indent=1))
    if not equal["weights_equal"]:
        raise SystemExit(1)
    if fewer is not None:
        return
    about = " ".join((__doc__ or "").split("\n\n")[3].split()).replace("ABOUT_BASE", ABOUT)
    results = {
        "title": "Fine-tuning: summaries, GSM8K, early stopping, a kill",
        "about": f"{about} {options.get('note', '')}".strip(),
        "rows": rows,
        "tables": [
            {"title": "Early stopping: validation loss of the summaries", "about": stopped["about"], "rows": stopped["rows"]},
            {"title": "Killed and resumed", "about": "GSM8K.", "rows": [equal]},
        ],
        "lost": "",
    }
    write_results("finetune_tasks", results, packages=("torch", "rouge-score"))


def write_task(data: Path, work: Path, task: str, tokenizer: Path, asked: int) -> None:
    """Rows to tune on, to test with and to ask, and their shards."""
    folder = work / task
    if (folder / "test" / "shards").is_dir():
        return
    folder.mkdir(exist_ok=True)
    source = PROJECT / "bench/finetune/dialogues.jsonl" if task == "summaries" else data / "sft/gsm8k/train.jsonl"
    rows, (prompt, answer) = [json.loads(line) for line in source.read_text("utf-8").splitlines()], FIELDS[task]
    if task == "gsm8k":
        encode = open_tokenizer(str(tokenizer)).encode
        rows = [row for row in rows if len(encode(row[prompt])) + len(encode(row[answer])) + 16 <= ROW_TOKENS]
    rows = [{**row, answer: f" {row[answer]}"} for row in rows]
    parts = {"train": [row for i, row in enumerate(rows) if i % TEST_EVERY[task]], "test": rows[:: TEST_EVERY[task]]}
    for part, chosen in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        tool(
            "tokenize_documents", f"work_dir={folder / part}", "num_workers=1", f"tokenize.pack_seq_len={SEQ_LEN}",
            f"tokenize.inputs=[{folder / f'{part}.jsonl'}]", f"tokenize.tokenizer={tokenizer}",
            f"tokenize.validation_fraction={(0.2 if task == 'summaries' else 0.02) if part == 'train' else 0}",
            "tokenize.overlap_threshold=null", f"tokenize.supervised.format={FORMATS[task]}",
            "tokenize.supervised.template=plain", f"tokenize.supervised.prompt={json.dumps(PROMPTS[task])}",
            "tokenize.require_lossless=false", f"tokenize.supervised.padding={'packed' if part == 'train' else 'padded'}",
        )  # fmt: skip
    asked_rows = [{"prompt": PROMPTS[task].format(**row), "answer": row[answer].strip()} for row in parts["test"]][:asked]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked_rows), encoding="utf-8")


def settings(begin: Path, work: Path, task: str, run_dir: Path, updates: int, **others: Any) -> Path:
    """The YAML of a tuning run."""
    config = load_model(begin).model_config.model_dump(mode="json")
    samples, rate = others.pop("samples"), others.pop("rate")
    values = {
        **COMMON, "run_dir": str(run_dir), "init_from": str(begin), "max_steps": updates, "model": {**config, "dropout": 0.1},
        "global_batch_size": samples, "micro_batch_size": samples, "evaluate_max_samples": 16, "keep_last": 100,
        "monitor": {"log_every_steps": 1},
        "data": {"seq_len": SEQ_LEN, "shuffle_block": 1, "document_mask": True,
                 "sources": {task: {"path": str(work / task / "train" / "shards")}}},
        "optim": {"lr": rate, "weight_decay": 0.01, "schedule": {"kind": "constant"}}, **others,
    }  # fmt: skip
    path = work / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def tune(begin: Path, work: Path, task: str, run_dir: Path, updates: int, **others: Any) -> None:
    """tools/train_model.py, until it is done."""
    if not is_done(run_dir, updates):
        tool("train_model", str(settings(begin, work, task, run_dir, updates, **others)))


def kill_and_resume(begin: Path, work: Path, run_dir: Path, updates: int, every: int, last: int) -> dict[str, Any]:
    """The run of GSM8K again, killed after update `last`; returns the update at which it resumed."""
    path = settings(begin, work, "gsm8k", run_dir, updates, samples=4, rate=1e-3, save_every_steps=every)
    if not run_dir.is_dir():
        command = [sys.executable, str(PROJECT / "tools" / "train_model.py"), str(path)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        while not trained(run_dir, last):
            if process.poll() is not None:
                raise SystemExit(f"ended with status {process.returncode} before update {last}")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"it was done before it was killed: status {process.returncode}")
    if not is_done(run_dir, updates):
        tool("train_model", str(path))
    starts = read_metrics(run_dir).of_kind("start")
    return {"killed_after_update": last, "resumed_at_update": starts[-1]["step"], "starts": len(starts)}


def trained(run_dir: Path, last: int) -> bool:
    """Whether update `last` is in the metrics, and a checkpoint is complete."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file() or not list(run_dir.glob("checkpoints/step_*/manifest.json")):
        return False
    rows = [json.loads(line) for line in metrics.read_text("utf-8").split("\n")[:-1]]
    return any(row["kind"] == "train" and row["step"] >= last for row in rows)


def compare_weights(first: Path, second: Path) -> dict[str, Any]:
    """Whether the last checkpoints' weights and optimizer states are the same bytes."""
    found = []
    for run_dir in (first, second):
        checkpoint = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
        files = read_json(checkpoint / "manifest.json")["files"]
        sums = sorted(entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors"))
        found.append((checkpoint.name, sums))
    return {"last_checkpoint": found[1][0], "sha256": found[1][1][0][:16], "weights_equal": found[0] == found[1]}


def stopping(run_dir: Path) -> dict[str, Any]:
    """The evaluations of a run that early stopping ended, and what it says at its end."""
    metrics = read_metrics(run_dir)
    done = metrics.of_kind("done")[-1]
    best = read_json(run_dir / "checkpoints" / "best.json")
    about = f"Ended after update {done['step']}, early stopping: {bool(done.get('early_stop'))}; the best is {best['step']}."
    return {"about": about, "rows": [{"step": str(r["step"]), "loss": r["loss"]} for r in metrics.of_kind("evaluate")]}


def evaluate(run_dir: Path, work: Path, task: str) -> Evaluation:
    """Loss on the test rows, and scores of greedy answers."""
    best = (run_dir / "checkpoints" / "best.json").is_file() and task in run_dir.name
    return evaluate_run(
        EvaluateConfig(
            run_dir=run_dir, step="best" if best else "last", shards={"test": work / task / "test" / "shards" / "train"},
            exercises={task: work / task / "asked.jsonl"}, answer_tokens=ANSWER_TOKENS[task],
            answer_stop=("\n",) if task == "summaries" else ("\n\n",),
        )
    )  # fmt: skip


def row_of(task: str, when: str, found: Evaluation) -> dict[str, Any]:
    """One line of the table."""
    scores = found.exercises[task]
    return {
        "task": task, "tuned": when == "after", "step": str(found.step), "test_loss": found.sources["test"].loss,
        "answers": scores.answers, "rouge1": scores.rouge1, "rouge2": scores.rouge2, "rougeL": scores.rougeL,
        "final_number": scores.final_number if task == "gsm8k" else None,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
