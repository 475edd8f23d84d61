"""Start or resume a training run: the same command starts it and, after any stop, resumes it from the newest good checkpoint.

    python tools/train_model.py configs/train/debug_cpu.yaml data.sources.main.path=/data/crawl/shards
    torchrun --nproc-per-node 8 tools/train_model.py configs/train/gpt_124m.yaml run_dir=runs/first
    slurm/pretrain.sh CONFIG ...                          (by srun, one task per GPU, with MASTER_ADDR and MASTER_PORT set)
    python tools/train_model.py CONFIG check=true         (only check settings, data, tokenizer and disk space)

SIGTERM, SIGUSR1 and Ctrl-C end it after the current update with a checkpoint. Exit status: 0 done, 75 stopped on request, 76
ended by the watchdog, 2 a mistake in the settings, 1 a crash.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from megagpt.command import main
from megagpt.monitor.writers import Writer
from megagpt.train.config import TrainConfig
from megagpt.train.loop import train


def run(config: TrainConfig) -> int:
    """Train, with the planner at hand for the message when memory runs out, and the panel for monitor.panel."""
    return train(config, planner=planned_parts, open_panel=open_panel)


def planned_parts(config: TrainConfig, ranks: int, kernels: str) -> Mapping[str, int]:
    """See megagpt.plan.run_plan, which is imported when it is needed."""
    from megagpt.plan import run_plan

    return run_plan.planned_parts(config, ranks, kernels)


def open_panel(run_dir: Path, stream: TextIO) -> Writer:
    """See megagpt.report.live_panel, which is imported when it is needed."""
    from megagpt.report.live_panel import LivePanel

    return LivePanel(run_dir, stream)


if __name__ == "__main__":
    main(TrainConfig, run, __doc__ or "")
