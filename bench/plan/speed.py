"""Planned against published tokens per second: efficiencies fitted on half of bench/plan/calibration.tsv, scored on the rest.

    python bench/plan/speed.py                 fit, score, write bench/results/plan_time.json (minutes: it plans memory too)
    python bench/plan/speed.py write=true      also put the efficiencies into megagpt/plan/hardware.yaml

The halves are told apart by the first byte of sha1(id). Fitted are runs without tensor, pipeline and context parallelism: this
trainer has no others. The bar is one constant MFU per kind of GPU, the median of the fitted half. Whether runs whose memory is
nearly full are slower than planned is looked up in the fitted half, by planned memory.
"""

import csv
import hashlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import correlation, median
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]

from megagpt.engine.config import FSDPConfig  # noqa: E402
from megagpt.engine.optim import OptimConfig  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402
from megagpt.model.gpt import ModelConfig  # noqa: E402
from megagpt.plan.communication import Traffic, traffic_seconds  # noqa: E402
from megagpt.plan.hardware import Efficiency, Gpu, find_network, hardware  # noqa: E402
from megagpt.plan.memory import plan_memory  # noqa: E402
from megagpt.plan.speed import Workload, step_time  # noqa: E402
from megagpt.plan.timeline import Job  # noqa: E402

TABLE = PROJECT / "bench" / "plan" / "calibration.tsv"
HARDWARE = PROJECT / "megagpt" / "plan" / "hardware.yaml"
FITTED = ("matmul", "half_tokens", "attention", "block_bytes", "exposed")
START = {"matmul": 0.75, "half_tokens": 200.0, "attention": 0.3, "block_bytes": 300.0, "exposed": 0.5}
MAIN = ("a100_40gb", "a100_80gb", "h100_80gb")
"""GPUs with enough rows for all five; of the others only the products' share is fitted, the rest is that of all three."""
PRIOR = 0.15
"""How strongly a GPU's efficiencies are held to those of all three together, per factor e."""
MISS = 0.25
REASONS = {
    "mpt-080": "not explained; 30 B on 8 GPUs with 8,192 tokens fill the memory, and its twin on H100 (mpt-021, fitted half) is"
    " slow too, but other runs of the fitted half whose memory is as full are not",
}
LOGIT_BYTES = 8
"""What the published trainer keeps per logit, which this one does not: its loss is not computed in chunks."""
FILLS = ((0, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, math.inf))


def read_rows() -> list[dict[str, Any]]:
    """The published runs that this trainer could do, as numbers."""
    rows = []
    for row in csv.DictReader(TABLE.open(encoding="utf-8"), delimiter="\t"):
        if not (row["tp"] == row["pp"] == row["cp"] == "1") or row["gpu"] not in hardware().gpus:
            continue
        values: dict[str, Any] = dict(row)
        for key in ("gpus", "gpus_per_node", "layers", "hidden", "heads", "kv_heads", "mlp", "mlp_mats", "vocab", "seq_len"):
            values[key] = int(row[key])
        for key in ("micro_batch", "grad_accum"):
            values[key] = int(row[key])
        values["rate"], values["parameters"] = float(row["tokens_per_s_per_gpu"]), int(float(row["params"]))
        values["held_back"] = int(hashlib.sha1(row["id"].encode()).hexdigest(), 16) % 2 == 1
        values["float8"] = "fp8" in row["precision"]
        rows.append(values)
    return rows


def workload(row: dict[str, Any], gpu: Gpu, speedup: float) -> Workload:
    """What one GPU of a published run did in a step."""
    head_size = row["hidden"] // row["heads"]
    products = 2 * row["hidden"] * (2 * row["heads"] + 2 * row["kv_heads"]) * head_size
    products += 2 * row["hidden"] * row["mlp"] * row["mlp_mats"]
    checkpointing = row["act_ckpt"]
    full = 1.0 if checkpointing == "full" else 0.5 if "every 2nd" in checkpointing else 0.0
    times, numel, ranks = 1 if row["sharding"] == "SHARD_GRAD_OP" else 2, row["parameters"], row["gpus"]
    network = find_network(gpu.network).gb_per_second * row["gpus_per_node"] / gpu.gpus_per_node

    def seconds(*traffic: Traffic) -> float:
        return traffic_seconds(
            [item for item in traffic if item.ranks > 1],
            gpus_per_node=row["gpus_per_node"],
            node_bandwidth=gpu.node_gb_per_second * 1e9,
            network_bandwidth=network * 1e9,
        )

    return Workload(
        layers=row["layers"],
        width=row["hidden"],
        vocab_size=row["vocab"],
        parameters=numel,
        block_products=products,
        block_attention=4 * row["seq_len"] * row["heads"] * head_size,
        repeated_products=full,
        repeated_elementwise=1.0 if checkpointing.startswith("selective") and not full else full,
        micro_batch_tokens=row["micro_batch"] * row["seq_len"],
        accumulation=row["grad_accum"],
        ranks=ranks,
        micro_batch_traffic_seconds=seconds(Traffic("all-gather", "weights", 2 * numel * times, ranks)),
        step_traffic_seconds=seconds(Traffic("reduce-scatter", "gradients", 4 * numel, ranks)),
        products_speedup=speedup if row["float8"] else 1.0,
    )


def predicted_rate(row: dict[str, Any], values: dict[str, float]) -> float:
    """Tokens per second and GPU."""
    gpu = hardware().gpus[row["gpu"]]
    efficiency = Efficiency(**{name: values[name] for name in FITTED}, median_error=0, p90_error=0, max_gpus=1, rows=1)
    work = workload(row, gpu, values.get("float8_speedup", 1.0))
    return work.micro_batch_tokens * work.accumulation / step_time(work, gpu, efficiency).total


def full_flops(row: dict[str, Any]) -> float:
    """FLOPs per token by the convention `full` of megagpt.model.flops."""
    work = workload(row, hardware().gpus[row["gpu"]], 1.0)
    return 3 * (work.layers * (work.block_products + work.block_attention) + 2 * work.width * work.vocab_size)


def least(function: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt with a numeric Jacobian: the vector at which the residuals' squares are smallest nearby."""
    point, damping = start.copy(), 1e-2
    residuals = function(point)
    for _ in range(100):
        steps = 1e-4 * np.eye(len(point))
        jacobian = np.array([(function(point + step) - residuals) / 1e-4 for step in steps]).T
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ residuals
        for _ in range(8):
            trial = point - np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-8), gradient)
            there = function(trial)
            if there @ there < residuals @ residuals:
                point, residuals, damping = trial, there, max(damping / 3, 1e-7)
                break
            damping *= 3
        else:
            break
    return point


def fit(rows: Sequence[dict[str, Any]], start: dict[str, float], names: Sequence[str], prior: float) -> dict[str, float]:
    """The logarithms of `names` that make sums of about |log error| smallest, held to `start` by `prior`."""
    origin = np.log([start[name] for name in names])

    def residuals(point: np.ndarray) -> np.ndarray:
        values = {**start, **dict(zip(names, np.exp(point), strict=True))}
        errors = np.array([math.log(predicted_rate(row, values) / row["rate"]) for row in rows])
        # Squares of these grow like |error|: a row that is far off does not bend the rest.
        robust = np.sign(errors) * np.sqrt(np.sqrt(errors**2 + 1e-4) - 1e-2 + 1e-9)
        return np.concatenate([robust, prior * (point - origin)])

    return {**start, **dict(zip(names, np.exp(least(residuals, origin)).tolist(), strict=True))}


def fit_all(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Efficiencies of every kind of GPU with runs in the fitted half."""
    train = [row for row in rows if not row["held_back"]]
    bf16 = [row for row in train if not row["float8"]]
    joint = dict(START)
    for _ in range(3):
        joint = fit([row for row in bf16 if row["gpu"] in MAIN], joint, FITTED, 0.02)
    result = {}
    for gpu in sorted({row["gpu"] for row in bf16}):
        mine = [row for row in bf16 if row["gpu"] == gpu]
        base = joint if gpu in MAIN else result.get("h100_80gb", joint)
        result[gpu] = fit(mine, base, FITTED if gpu in MAIN else ("matmul",), PRIOR)
        float8 = [row for row in train if row["float8"] and row["gpu"] == gpu]
        if float8:
            result[gpu] = fit(float8, {**result[gpu], "float8_speedup": 1.4}, ("float8_speedup",), 0.02)
        else:
            result[gpu].pop("float8_speedup", None)
    return result


def size_of(row: dict[str, Any]) -> str:
    """Model size in words."""
    billions = row["parameters"] / 1e9
    bounds = ((0.5, "below 0.5 B"), (2, "0.5 to 2 B"), (5, "2 to 5 B"), (10, "5 to 10 B"))
    return next((name for bound, name in bounds if billions < bound), "10 B and more")


def score(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Errors on the held-back half, beside those of one constant MFU per kind of GPU."""
    constants = {}
    for gpu in fitted:
        peak = hardware().gpus[gpu].bf16_tflops * 1e12
        mine = [r for r in rows if r["gpu"] == gpu and not r["held_back"] and not r["float8"]]
        constants[gpu] = median(full_flops(r) * r["rate"] / peak for r in mine)
    scored = []
    for row in rows:
        if not row["held_back"] or row["gpu"] not in fitted or (row["float8"] and "float8_speedup" not in fitted[row["gpu"]]):
            continue
        peak = hardware().gpus[row["gpu"]].bf16_tflops * 1e12
        scored.append(
            {
                "id": row["id"],
                "gpu": row["gpu"] + (", float8" if row["float8"] else ""),
                "size": size_of(row),
                "sharding": "one node" if row["gpus"] <= row["gpus_per_node"] else "several nodes",
                "gpus": row["gpus"],
                "seq_len": row["seq_len"],
                "published_tokens_per_s_per_gpu": row["rate"],
                "scope": "without H200 and float8",
                "error": predicted_rate(row, fitted[row["gpu"]]) / row["rate"] - 1,
                "constant_error": constants[row["gpu"]] * peak / full_flops(row) / row["rate"] - 1,
            }
        )
    tables = []
    titles = {"gpu": "By kind of GPU", "scope": "All together", "size": "By model size", "sharding": "By number of nodes"}
    for key, title in titles.items():
        tables.append(
            {"title": title, "about": "", "rows": [summary(key, v, scored) for v in sorted({s[key] for s in scored})]}
        )
    return {"constants": constants, "scored": scored, "tables": tables}


def summary(key: str, value: str, scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error of the rows with that value; H200 has its own row and is in no other."""
    mine = [
        s
        for s in scored
        if s[key] == value and (key == "gpu" or s["gpu"] != "h200") and "float8" not in s["gpu"][: 99 * (key != "gpu")]
    ]
    errors, constant = [abs(s["error"]) for s in mine], [abs(s["constant_error"]) for s in mine]
    return {
        key: value,
        "runs": len(mine),
        "median_error_pct": round(100 * median(errors), 1),
        "worst_error_pct": round(100 * max(errors), 1),
        "constant_median_error_pct": round(100 * median(constant), 1),
        "constant_worst_error_pct": round(100 * max(constant), 1),
    }


def won_by_the_constant(tables: list[dict[str, Any]]) -> list[str]:
    """Where one constant MFU errs less, in median or at worst."""
    found = []
    for row in (row for table in tables for row in table["rows"]):
        for what in ("median", "worst"):
            error, constant = row[f"{what}_error_pct"], row[f"constant_{what}_error_pct"]
            if constant < error:
                found.append(f"{next(iter(row.values()))}: {what} {error} % (one constant MFU: {constant} %)")
    return found


def planned_fill(row: dict[str, Any]) -> float:
    """Planned memory of a published run as a share of the GPU's, without allocator and context."""
    checkpointing, gpt2 = row["act_ckpt"], row["mlp_mats"] == 2
    model = {
        **{"vocab_size": row["vocab"], "seq_len": row["seq_len"], "num_layers": row["layers"], "num_heads": row["heads"]},
        **{"hidden_size": row["hidden"], "mlp_size": row["mlp"], "family": "gpt2" if gpt2 else "llama"},
        **({} if gpt2 else {"num_kv_heads": row["kv_heads"], "tied_head": row["tied"] == "1"}),
    }
    every = 0 if checkpointing == "none" else 2 if "every 2nd" in checkpointing else 1
    job = Job(
        ModelConfig.model_validate(model),
        FSDPConfig(reshard_after_forward=row["sharding"] != "SHARD_GRAD_OP", accumulate="sharded"),
        OptimConfig(),
        "bf16",
        row["micro_batch"],
        row["seq_len"],
        row["gpus"],
        accumulation=min(2, row["grad_accum"]),
        checkpoint_every=every,
        checkpoint_selectively=every == 1 and checkpointing.startswith("selective"),
    )
    logits = row["micro_batch"] * row["seq_len"] * row["vocab"] * LOGIT_BYTES
    return (plan_memory(job).peak + logits) / 2**30 / hardware().gpus[row["gpu"]].memory_gib


def fill_table(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Errors in the fitted half by planned memory, and the rank correlation of the two."""
    mine = [row for row in rows if not row["held_back"] and not row["float8"] and row["gpu"] in fitted and row["gpu"] != "h200"]
    pairs = [(planned_fill(row), predicted_rate(row, fitted[row["gpu"]]) / row["rate"] - 1) for row in mine]
    table = []
    for low, high in FILLS:
        errors = sorted(100 * error for fill, error in pairs if low <= fill < high)
        name = f"{low:.0%} and more" if high == math.inf else f"{low:.0%} to {high:.0%}"
        entry = {"planned_memory": name, "runs": len(errors), "median_error_pct": round(median(errors), 1)}
        table.append({**entry, "least_error_pct": round(errors[0], 1), "largest_error_pct": round(errors[-1], 1)})
    fills, errors = np.argsort(np.argsort(np.array(pairs).T)).tolist()
    related = correlation(fills, errors)
    return {
        "title": "Fitted half, by planned memory",
        "about": f"Signed errors (above 0: slower than planned) of {len(mine)} runs by planned memory as a share of the GPU's;"
        f" the rank correlation is {related:+.2f}. A term for nearly full memory is not supported by these runs, so the"
        " model has none.",
        "rows": table,
        "correlation": related,
    }


def write_hardware(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]], scored: list[dict[str, Any]]) -> None:
    """Put the efficiencies into hardware.yaml, behind each GPU's source."""
    text = HARDWARE.read_text(encoding="utf-8")
    text = re.sub(r"    efficiency:\n(?:      .*\n)+", "", text)
    for gpu, values in fitted.items():
        errors = sorted(abs(s["error"]) for s in scored if s["gpu"] == gpu)
        lines = [f"      {name}: {value:.4g}" for name, value in values.items()]
        lines.append(f"      median_error: {median(errors):.3f}")
        lines.append(f"      p90_error: {errors[math.ceil(0.9 * len(errors)) - 1]:.3f}")
        lines.append(f"      max_gpus: {max(row['gpus'] for row in rows if row['gpu'] == gpu)}")
        lines.append(f"      rows: {sum(row['gpu'] == gpu for row in rows)}")
        text = re.sub(
            rf"(  {gpu}:\n(?:    .*\n)+)", lambda m, lines=lines: m[1] + "    efficiency:\n" + "\n".join(lines) + "\n", text
        )
    HARDWARE.write_text(text, encoding="utf-8")


def main() -> None:
    """Fit, score, write."""
    rows = read_rows()
    fitted = fit_all(rows)
    result = score(rows, fitted)
    if "write=true" in sys.argv:
        write_hardware(rows, fitted, result["scored"])
    misses = [s for s in result["scored"] if abs(s["error"]) > MISS]
    for item in misses:
        item["reason"] = REASONS.get(item["id"], "not known")
    by_memory = fill_table(rows, fitted)
    for table in [*result["tables"], by_memory]:
        for row in table["rows"]:
            print(row)
    lost = [
        f"{s['id']} ({s['gpu']}, {s['gpus']} GPUs, {s['seq_len']:,} tokens): {100 * s['error']:+.0f} %: {s['reason']}."
        for s in misses
    ]
    won = won_by_the_constant(result["tables"])
    write_results(
        "plan_time",
        {
            "title": "Planned against published speed",
            "about": "Tokens per second of published runs of other trainers (bench/plan/calibration.tsv, with sources), planned"
            " with efficiencies fitted on the other half of the table; beside it one constant MFU per kind of GPU, the median"
            " of the fitted half. These are FSDP runs of other code: nothing here was measured with this trainer, and DeepSpeed"
            " has no row.",
            "rows": result["tables"][0]["rows"],
            "tables": [*result["tables"][1:], by_memory],
            "lost": " ".join(
                [
                    *(["Off by more than 25 %:", *lost] if lost else []),
                    *([f"One constant MFU errs less: {'; '.join(won)}."] if won else []),
                ]
            ),
            "fitted": fitted,
            "constants": result["constants"],
            "scored": result["scored"],
        },
    )


if __name__ == "__main__":
    main()
