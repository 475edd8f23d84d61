"""MegaGPT's own training as a user starts it, under bench/training/compare.py's clock: the real train(), every feature on."""

import os
from pathlib import Path
from typing import Any

from bench.training.clock import Clock, read_job
from megagpt.config import validate
from megagpt.monitor.metrics import read_metrics
from megagpt.train.config import TrainConfig
from megagpt.train.loop import train


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration, as its YAML would be."""
    engines: dict[str, dict[str, Any]] = {
        "zero0": {"kind": "deepspeed", "zero_stage": 0},
        "zero1": {"kind": "deepspeed", "zero_stage": 1},
        "zero2": {"kind": "deepspeed", "zero_stage": 2},
        "zero3": {"kind": "deepspeed", "zero_stage": 3},
        "fsdp": {"kind": "fsdp"},
    }
    return {
        "run_dir": job["run_dir"],
        "seed": job["seed"],
        "max_steps": job["steps"],
        "global_batch_size": job["micro_batch_size"] * job["micro_batches"] * int(os.environ["WORLD_SIZE"]),
        "micro_batch_size": job["micro_batch_size"],
        "precision": job["precision"],
        "float8": job.get("float8", "none"),
        "compile": job["compile"],
        "determinism": job.get("determinism", "none"),
        "activation_checkpointing": job.get("checkpointing", "none"),
        "model": job["model"],
        "data": {"seq_len": job["seq_len"], "sources": {"main": {"path": job["shards"]}}},
        "optim": {
            "kind": job.get("optimizer", "adamw"),
            "lr": job["lr"],
            "weight_decay": job["weight_decay"],
            "lr_factors": job.get("lr_factors", {}),
            "schedule": {"kind": "constant"},
        },
        "engine": engines[job["layout"]],
        "save_every_steps": job.get("save_every_steps", 1000),
        "evaluate_every_steps": job.get("evaluate_every_steps", 0),
        "evaluate_max_samples": job.get("evaluate_max_samples"),
        "watchdog": {"stall_seconds": 7200, "long_seconds": 7200},  # it is on, and we are stopped while others have their turn
        "guard": job.get("guard", {}),
        "monitor": {"log_every_steps": job["log_every_steps"]},
    }


def main() -> None:
    """Train."""
    job = read_job()
    run(job, settings(job), Clock())


def run(job: dict[str, Any], given: dict[str, Any], clock: Clock) -> None:
    """Train as `given` says, then read losses and the wait for data from the run's own metrics."""
    config = validate(TrainConfig, given, source="bench")
    status = train(config)
    if status != 0:
        raise SystemExit(status)
    metrics = read_metrics(Path(job["run_dir"]))
    rows = metrics.of_kind("train")
    if rows:
        clock.extra |= {"data_wait_s": rows[-1]["seconds"].get("data_wait", 0.0), "data_wait_until_step": rows[-1]["step"]}
    if job.get("evaluate_every_steps"):
        clock.extra["validation"] = [(row["step"], row["loss"]) for row in metrics.of_kind("evaluate")]
    clock.write(job["steps"] - job["resumed_at"], [row["loss"] for row in rows])


if __name__ == "__main__":
    main()
