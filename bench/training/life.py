"""Start, resume and memory of training on CPU: what a run costs besides its steps.

    python -m bench.training.life                about 8 minutes (environments made before)
    python -m bench.training.life parts=memory

start: from the command to the end of the first update; resume: the same command again after a checkpoint of step 3, to the end
of the next update; each alone on the cores, repeated in turn, 10M parameters, fp32, one process. memory: 2,000 updates of a
small model with everything that MegaGPT does in a run (log, ledger, guard, watchdog, checkpoints every 250), resident memory
every 100 updates.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.training.compare import ALONE, BARE, CELLS, Cell, contender, prepare_job
from bench.training.turns import Outcome, run_turn_about
from megagpt.measurement import spread, write_results

STEPS = 3
SAVING = {name: ALONE[name] for name in ALONE if name != BARE}
"""The bare loop has no checkpoints."""
MEMORY_STEPS = 2000
MEMORY_EVERY = 100
MEMORY = {name: ALONE[name] for name in (BARE, "megagpt, deepspeed ZeRO-1", "megagpt, fsdp")}


def main(words: Sequence[str]) -> None:
    """Run both parts and write the table."""
    options = dict(word.split("=", 1) for word in words)
    parts = options.get("parts", "life,memory").split(",")
    repetitions = int(options.get("repetitions", 3))
    life = start_and_resume(repetitions) if "life" in parts else []
    memory = memory_over_steps(int(options.get("steps", MEMORY_STEPS))) if "memory" in parts else []
    tables = [{"title": f"Resident memory over {MEMORY_STEPS:,} updates", "rows": memory}] if memory else []
    if "parts" not in options and "steps" not in options:
        about = (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip()
        results = {"title": "Training on CPU: start, resume, memory", "about": about, "rows": life, "tables": tables}
        write_results("training_life", {**results, "lost": lost(life)}, packages=("torch", "deepspeed"))


def start_and_resume(repetitions: int) -> list[dict[str, Any]]:
    """Wall and CPU time to the first update, from nothing and from a checkpoint."""
    cell = replace(CELLS["one_fp32"], contenders={BARE: ALONE[BARE], **SAVING}, steps=STEPS)
    seen: dict[str, dict[str, list[Outcome]]] = {name: {"start": [], "resume": []} for name in cell.contenders}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="bench_life_") as temporary:
            folder = Path(temporary)
            job = prepare_job(replace(cell, steps=2 * STEPS), folder)
            for phase, steps, resumed_at in (("start", STEPS, 0), ("resume", 2 * STEPS, STEPS)):
                for name, (program, layout) in cell.contenders.items():
                    if phase == "resume" and name == BARE:
                        continue
                    changes = {"steps": steps, "resumed_at": resumed_at, "save": name != BARE, "log_every_steps": 1}
                    one = contender(name, program, layout, 1, job | changes, folder)
                    # Without it litgpt cannot read its own checkpoints: torch has loaded weights only since 2.6.
                    one = replace(one, environment={**one.environment, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
                    outcomes, failures = run_turn_about([one], folder / phase)
                    print(*failures.values(), file=sys.stderr, flush=True)
                    seen[name][phase] += outcomes.values()
    rows = []
    for name, phases in seen.items():
        row: dict[str, Any] = {"contender": name}
        for phase, outcomes in phases.items():
            row[f"{phase}_wall_s"] = spread([o.start_wall_s for o in outcomes]) if outcomes else None
            row[f"{phase}_cpu_s"] = median(o.start_cpu_s for o in outcomes) if outcomes else None
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def memory_over_steps(steps: int) -> list[dict[str, Any]]:
    """Resident memory of each contender after every MEMORY_EVERY updates, and its growth over the second half."""
    cell = Cell("tiny", "fp32", MEMORY, steps=steps)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_life_") as temporary:
        folder = Path(temporary)
        job = prepare_job(cell, folder) | {"save_every_steps": 250, "log_every_steps": 10}
        job["guard"] = {"loss_rise": 100.0}  # it judges every step, but this text has spikes, and going back is more updates
        for name, (program, layout) in cell.contenders.items():
            one = contender(name, program, layout, 1, job, folder)
            one = replace(one, environment={**one.environment, "BENCH_RSS_EVERY": str(MEMORY_EVERY)})
            outcomes, failures = run_turn_about([one], folder / "memory")
            if failures:
                raise SystemExit(str(failures))
            outcome = outcomes[name]
            seen = [value / 2**20 for value in outcome.ranks[0]["rss_bytes"]]
            if len(seen) != steps // MEMORY_EVERY:
                raise SystemExit(f"{name}: {len(seen)} readings of {steps} updates: its optimizer is called several times each")
            first, waited = outcome.ranks[0], outcome.ranks[0].get("data_wait_s")
            half = seen[len(seen) // 2 :]
            rows.append(
                {
                    "contender": name,
                    "updates": steps,
                    "rss_mib_at_5_percent": seen[0],
                    "rss_mib_halfway": half[0],
                    "rss_mib_at_end": seen[-1],
                    "wait_for_data_ms_per_update": 1000 * waited / first["data_wait_until_step"]
                    if waited is not None
                    else None,
                    "growth_kib_per_update_second_half": slope(half) * 1024 / MEMORY_EVERY,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def slope(values: Sequence[float]) -> float:
    """Least-squares growth per entry."""
    count, mean = len(values), sum(values) / len(values)
    middle = (count - 1) / 2
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(count))


def lost(rows: list[dict[str, Any]]) -> str:
    """Which peers start or resume in less CPU time than our engines."""
    sentences = []
    for phase in ("start", "resume"):
        ours = {r["contender"]: r[f"{phase}_cpu_s"] for r in rows if r["contender"].startswith("megagpt")}
        for name, value in ours.items():
            peers = [r for r in rows if r["contender"] not in (*ours, BARE) and r[f"{phase}_cpu_s"] is not None]
            better = [r["contender"] for r in peers if r[f"{phase}_cpu_s"] < value]
            if better:
                sentences.append(f"{name} needs more CPU time to {phase} than {', '.join(better)}.")
    return " ".join(sentences)


if __name__ == "__main__":
    main(sys.argv[1:])
