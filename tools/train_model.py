"""Start or resume a training run: the same command starts it and, after any stop, resumes it from the newest good checkpoint.

    python tools/train_model.py configs/train/debug_cpu.yaml data.sources.main.path=/data/crawl/shards
    torchrun --nproc-per-node 8 tools/train_model.py configs/train/gpt_124m.yaml run_dir=runs/first
    slurm/pretrain.sh CONFIG ...                          (by srun, one task per GPU, with MASTER_ADDR and MASTER_PORT set)
    python tools/train_model.py CONFIG check=true         (only check settings, data, tokenizer and disk space)

SIGTERM, SIGUSR1 and Ctrl-C end it after the current update with a checkpoint. Exit status: 0 done, 75 stopped on request, 76
ended by the watchdog, 2 a mistake in the settings, 1 a crash.
"""

from megagpt.command import main
from megagpt.train.config import TrainConfig
from megagpt.train.loop import train

if __name__ == "__main__":
    main(TrainConfig, train, __doc__ or "")
