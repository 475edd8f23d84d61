"""The guard against three windows of noise in the data and a NaN: what a run learns, beside a clean and an unguarded one.

    python tests/soak/guard.py [--short]     (about five minutes; --short: a third of the steps)

Two ranks train a small model on the modules of Python's standard library as bytes, less than once over. Injected
faults (tests/support/faults) put noise into the data and the NaN into a loss; the trainer does not know of it.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from chaos import make_shards  # noqa: E402
from ranks import Ranks  # noqa: E402

from megagpt.measurement import write_results  # noqa: E402
from megagpt.monitor.metrics import read_metrics  # noqa: E402
from megagpt.report.inspect_data import check_ledger  # noqa: E402

BATCH = 16


def run(folder: Path, shards: Path, steps: int, faults: list[dict[str, Any]], *, guarded: bool = True) -> Path:
    """Train under faults; the run's directory."""
    model = {"vocab_size": 257, "seq_len": 128, "num_layers": 4, "num_heads": 4, "hidden_size": 96}
    values = {
        "run_dir": str(folder / "run"),
        "max_steps": steps,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH // 2,
        "precision": "fp32",
        "model": model,
        "data": {"seq_len": 128, "sources": {"docs": {"path": str(shards)}}},
        "optim": {"lr": 2e-3, "schedule": {"warmup_steps": 20}},
        "engine": {"zero_stage": 1},
        "guard": {"enabled": guarded, "window_steps": 64, "min_steps": 32, "skip_steps": 2},
        "monitor": {"log_every_steps": 1},
        "save_every_steps": 20,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    os.environ["FAULTS"] = json.dumps(faults)
    ranks = Ranks([str(PROJECT / "tools" / "train_model.py"), str(folder / "run.yaml")], 2, folder / "logs")
    if ranks.wait(1800) != [0, 0]:
        raise SystemExit(ranks.output())
    return folder / "run"


def row(name: str, run_dir: Path, clean: float) -> dict[str, Any]:
    """What became of one run."""
    metrics = read_metrics(run_dir)
    loss = metrics.of_kind("evaluate")[-1]["loss"]
    return {
        "run": name,
        "validation_loss": loss,
        "difference_to_clean": loss - clean,
        "rewinds": len(metrics.of_kind("rewind")),
        "updates_not_applied": len(metrics.of_kind("skip")),
    }


def main() -> None:
    """Four runs."""
    steps = 200 if "--short" in sys.argv else 600
    windows = [[steps * part // 10, steps * part // 10 + width] for part, width in ((3, 2), (6, 1), (8, 1))]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(PROJECT / "tests" / "support" / "faults"), os.environ.get("PYTHONPATH", "")]
    ).rstrip(":")
    poison = {"kind": "poisoned", "windows": windows, "batch": BATCH}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder / "corpus", sorted(Path(os.__file__).parent.glob("*.py")))

        def faults(which: str) -> list[dict[str, Any]]:
            return [poison, {"kind": "not_a_number", "rank": 1, "step": steps // 5, "once": str(folder / f"nan_{which}")}]

        clean = run(folder / "clean", shards, steps, [])
        guarded = run(folder / "guarded", shards, steps, faults("guarded"))
        (folder / "given" / "run").mkdir(parents=True)
        shutil.copy(guarded / "skipped.json", folder / "given" / "run")
        given = run(folder / "given", shards, steps, faults("given"))
        unguarded = run(folder / "unguarded", shards, steps, faults("unguarded"), guarded=False)
        reference = read_metrics(clean).of_kind("evaluate")[-1]["loss"]
        rows = [
            row("clean data, no NaN", clean, reference),
            row("noise and NaN, guarded", guarded, reference),
            row("noise and NaN, the same samples left out from the beginning", given, reference),
            row("noise and NaN, guard.enabled=false", unguarded, reference),
        ]
        losses = [{r["step"]: r["loss"] for r in read_metrics(path).of_kind("train")} for path in (guarded, given)]
        reasons = [str(found["reason"]) for found in read_metrics(guarded).of_kind("rewind")]
        ledger = next(iter(check_ledger(guarded))).partition(": ")[2]
    within = abs(rows[1]["difference_to_clean"]) <= 0.01
    results = {
        "title": "The guard",
        "about": f"{steps} steps of two ranks with {len(windows)} windows of noise in the data and a NaN in one loss. The "
        f"guarded run ends {rows[1]['difference_to_clean']:+.4f} nats from the clean one in validation loss. Its losses are "
        f"those of a run with the same samples left out from the beginning, bit for bit: {losses[0] == losses[1]}. "
        f"The ledger: {ledger}.",
        "rows": rows,
        "lost": "" if within else "The guarded run ends further than 0.01 nats from the clean one.",
        "reasons": reasons,
    }
    write_results("guard", results, packages=("torch", "megagpt"))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
