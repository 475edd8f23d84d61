"""MegaGPT's own fine-tuning as a user starts it, under bench/finetune/compare.py's clock: the real train()."""

from typing import Any

from bench.training.clock import Clock, read_job, resident_bytes
from bench.training.peers import megagpt as pretraining


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration, as its YAML would be."""
    given = pretraining.settings(job)
    optim = {"lr": job["lr"], "weight_decay": job["weight_decay"], "beta2": 0.95, "max_grad_norm": 1.0}
    optim["schedule"] = {"kind": "cosine", "min_lr_ratio": 0.0}
    source = {"path": job["shards"]}
    lora = job["lora"]
    return {
        **given,
        "init_from": job["start_run"],
        "tune": {"lora": {"rank": lora["rank"], "alpha": lora["alpha"], "targets": ["*"]}} if lora else {},
        "data": {"seq_len": job["seq_len"], "shuffle_block": 1, "sources": {"main": source}},
        "optim": optim,
    }


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    clock.extra["imported_rss_bytes"] = resident_bytes()
    pretraining.run(job, settings(job), clock)


if __name__ == "__main__":
    main()
