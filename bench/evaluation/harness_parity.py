"""Scores of one model by four ways: our adapter for lm-eval on one and two ranks, our own tasks, lm-eval's hf backend.

    python -m bench.evaluation.harness_parity
    python -m bench.evaluation.harness_parity questions=100

BLiMP (four of its files), LAMBADA and PIQA from the test data, stories260K imported and exported. The harness reads the same
task and data files on every side, hf (which needs accelerate) reads the export. Compared are the log-likelihood and the greedy
verdict of every request, and every accuracy. All sides compute in fp64: in fp32 PIQA's answers of 300 nats differ by up to
1.5e-4 nats, as hf adds their tokens up in fp32.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.measurement import PROJECT, write_results

DATA = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data"))
BLIMP = ("anaphor_number_agreement", "determiner_noun_agreement_1", "regular_plural_subject_verb_agreement_1", "wh_island")
CHOICES = {"output_type": "multiple_choice", "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")]}
PAIRS = {**CHOICES, "doc_to_text": "", "doc_to_target": 0, "doc_to_choice": "{{[sentence_good, sentence_bad]}}"}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"blimp_{name}": (f"blimp/{name}.jsonl", PAIRS) for name in BLIMP},
    "lambada_openai": (
        "lambada_openai.jsonl",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "piqa": (
        "piqa.jsonl",
        {**CHOICES, "doc_to_text": "{{query.rstrip()}}\nAnswer:", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"},
    ),
}
"""Data file and the harness's settings of each task; prompts as its own tasks have them."""
OURS = {"acc": "accuracy", "acc_norm": "accuracy_per_character", "acc_bytes": "accuracy_per_byte"}
SIDES = ("adapter", "adapter_two_ranks", "own_tasks", "hf")


def write_tasks(folder: Path, data: Path) -> None:
    """A YAML file per task, which names its data file in `data`."""
    folder.mkdir()
    for name, (file, settings) in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data / "eval" / file)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **source, **settings}))


def write_model(folder: Path, data: Path) -> None:
    """stories260K as a run, and its export in fp32."""
    from megagpt.convert.export_hf import ExportConfig, export_model
    from megagpt.convert.import_hf import ImportConfig, import_model

    model = data / "model"
    import_model(ImportConfig(source=model / "stories260K.bin", tokenizer=model / "tok512.bin", run_dir=folder / "run"))
    export_model(ExportConfig(run_dir=folder / "run", output_dir=folder / "export", dtype="fp32"))


def answers_of(side: str, folder: Path, data: Path, questions: int | None) -> dict[str, Any] | None:
    """What one side finds, by task: `accuracies` by lm-eval's names, `requests` [nats, greedy]. None on ranks but the first."""
    from megagpt.checkpoint.load_model import load_model
    from megagpt.distributed.world import joined_world
    from megagpt.evaluate.harness import import_harness, open_adapter
    from megagpt.evaluate.likelihood import text_scorer
    from megagpt.evaluate.tasks import read_task, score_task

    lm_eval = import_harness(offline=True)
    from lm_eval.tasks import TaskManager

    with joined_world("cpu") as world:
        loaded = load_model(folder / "run")
        parts = (loaded.model.double(), loaded.model_config, loaded.tokenizer)
        if side == "own_tasks":
            score = text_scorer(*parts, micro_batch_size=16, world=world)
            found = {}
            for name, (file, _) in TASKS.items():
                items = read_task(data / "eval" / file)[:questions]
                requests = score([option for item in items for option in item.options])
                result = score_task(lambda pairs, requests=requests: requests, items)
                accuracies = {key: getattr(result, field) for key, field in OURS.items()}
                found[name] = {"accuracies": accuracies, "requests": requests}
            return found
        model: dict[str, Any] = {"model": open_adapter(*parts, micro_batch_size=16, world=world)}
        if side == "hf":
            arguments = {"pretrained": str(folder / "export"), "dtype": "float64"}
            model = {"model": "hf", "model_args": arguments, "batch_size": 16, "device": "cpu"}
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        options = {"task_manager": manager, "limit": questions, "bootstrap_iters": 0, "log_samples": True}
        results = lm_eval.simple_evaluate(tasks=list(TASKS), **model, **options)
    if results is None:
        return None
    found = {}
    for name in TASKS:
        metrics = {key.partition(",")[0]: value for key, value in results["results"][name].items() if key.endswith(",none")}
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        requests = [(float(resps[0][0]), bool(resps[0][1])) for sample in samples for resps in sample["resps"]]
        accuracies = {key: metrics[key] for key in OURS if key in metrics}
        found[name] = {"accuracies": accuracies, "requests": requests}
    return found


def compare(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per task. Raises SystemExit where an accuracy or greedy verdict differs, or a log-likelihood by over 1e-4 nats."""
    rows = []
    for name in TASKS:
        reference = found["hf"][name]
        row: dict[str, Any] = {"task": name, "requests": len(reference["requests"]), **reference["accuracies"]}
        for side in SIDES[:3]:
            other = found[side][name]
            accuracies = {key: other["accuracies"][key] for key in reference["accuracies"]}
            pairs = list(zip(other["requests"], reference["requests"], strict=True))
            row[f"{side}_max_nats_difference"] = max(abs(a[0] - b[0]) for a, b in pairs)
            if accuracies != reference["accuracies"] or any(a[1] != b[1] for a, b in pairs):
                raise SystemExit(
                    f"{name}, {side}: accuracies {accuracies}, hf {reference['accuracies']}, or greedy verdicts differ"
                )
            if row[f"{side}_max_nats_difference"] > 1e-4:
                raise SystemExit(f"{name}, {side}: log-likelihoods differ by {row[f'{side}_max_nats_difference']:.3g} nats")
        if found["adapter"][name]["requests"] != found["adapter_two_ranks"][name]["requests"]:
            raise SystemExit(f"{name}: two ranks do not have the bits of one")
        rows.append(row)
    return rows


def run_sides(folder: Path, data: Path, questions: int | None, sides: Sequence[str] = SIDES) -> dict[str, dict[str, Any]]:
    """Model, export and task files into `folder`, and what each side finds, in processes of their own."""
    write_tasks(folder / "tasks", data)
    write_model(folder, data)
    found = {}
    for side in sides:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if side == "adapter_two_ranks" else []
        )
        path = folder / f"{side}.json"
        words = [f"side={side}", f"folder={folder}", f"data={data}", f"out={path}", f"questions={questions or 0}"]
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROJECT),
        }
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "bench.evaluation.harness_parity", *words],
            env=environment, cwd=PROJECT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{side}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        found[side] = json.loads(path.read_text())
    return found


def main(words: Sequence[str]) -> None:
    """Run all sides, compare, write the result; with `side=` be one of them."""
    options = dict(word.split("=", 1) for word in words)
    questions = int(options.get("questions", 0)) or None
    if "side" in options:
        found = answers_of(options["side"], Path(options["folder"]), Path(options["data"]), questions)
        if found is not None:
            Path(options["out"]).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="bench_harness_") as folder:
        rows = compare(run_sides(Path(folder), DATA, questions))
    results = {
        "title": "Scores by lm-eval, its hf backend and our own tasks",
        "about": " ".join((__doc__ or "").split("\n\n")[2].split())
        + " Accuracies and greedy verdicts are equal on all sides; two ranks have the bits of one.",
        "questions_per_task": questions or "all",
        "rows": rows,
    }
    write_results("harness_parity", results, packages=("lm_eval", "torch", "transformers"))


if __name__ == "__main__":
    main(sys.argv[1:])
