"""torchtitan's pretraining: its own `torchtitan.train.Trainer` over its Llama 3 as a registered model, under our clock.

What is its own and stays so: its initial weights; on one GPU it shards nothing and casts by autocast over fp32 weights; weight
decay is on the gains of the norms too; batches are copied from unpinned memory; blocks are compiled one by one. Its head is not
tied to the embedding: against a model with a tied head it has vocab_size x hidden_size more parameters (1b3: 103 million of
1,420), which the optimizer updates too; the matrix products of a step are the same.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from bench.training.clock import Clock, Rows, read_job


def stand_in_for_a_gpu() -> None:
    """Only for the dry run of bench/gpu: torchtitan knows no CPU, so torch.cpu gets what it asks of torch.cuda. It looks for
    its device while it is imported, hence before that; torch gives a CPU the backend gloo."""
    torch._utils._get_available_device_type = lambda: "cpu"
    answers = {
        "current_device": 0,  # torch.cpu's is a word, and a barrier wants numbers
        "get_device_name": "CPU",
        "get_device_properties": SimpleNamespace(total_memory=1),
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)


if not torch.cuda.is_available():
    stand_in_for_a_gpu()

from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.config import Debug, Job, JobConfig, LRScheduler, Metrics, Model, Optimizer, Training  # noqa: E402
from torchtitan.config.job_config import ActivationCheckpoint, Compile  # noqa: E402
from torchtitan.models import llama3  # noqa: E402
from torchtitan.models.llama3.model.args import RoPEScalingArgs  # noqa: E402
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402
from torchtitan.train import Trainer  # noqa: E402


def sizes(model: dict[str, Any]) -> llama3.TransformerModelArgs:
    """Our model's sizes as torchtitan names them, without its scaling of the rotary frequencies."""
    width = model["hidden_size"]
    unscaled_mlp = int(2 * (4 * width) / 3)  # as its FeedForward computes it; it truncates the product with the multiplier
    return llama3.TransformerModelArgs(
        dim=width,
        n_layers=model["num_layers"],
        n_heads=model["num_heads"],
        n_kv_heads=model.get("num_kv_heads") or model["num_heads"],
        vocab_size=model["vocab_size"],
        multiple_of=1,
        ffn_dim_multiplier=(model["mlp_size"] + 0.5) / unscaled_mlp,
        norm_eps=model.get("norm_eps", 1e-5),
        rope_theta=10000.0,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    )


class Samples(torch.utils.data.IterableDataset):
    """Rows as torchtitan takes them, from the first again after the last."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._rows = Rows(job)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for index in itertools.count():
            tokens = self._rows[index % len(self._rows)]
            yield {"input": tokens[:-1]}, tokens[1:]


def loader(
    job: dict[str, Any], *, dp_world_size: int, dp_rank: int, job_config: JobConfig, **_: Any
) -> ParallelAwareDataloader:
    """Its loader over our rows, with its settings."""
    options = {**asdict(job_config.training.dataloader), "batch_size": job_config.training.local_batch_size}
    return ParallelAwareDataloader(Samples(job), dp_rank=dp_rank, dp_world_size=dp_world_size, **options)


def spec(job: dict[str, Any]) -> TrainSpec:
    """Its specification of Llama 3 with our sizes and rows, and neither tokenizer, validator nor other formats of weights."""
    return replace(
        llama3.get_train_spec(),
        model_args={"bench": sizes(job["model"])},
        build_dataloader_fn=partial(loader, job),
        build_tokenizer_fn=None,
        build_validator_fn=None,
        state_dict_adapter=None,
    )


def config(job: dict[str, Any]) -> JobConfig:
    """The same schedule, clipping, precision and logging as every contender."""
    micro_batch_size = job["micro_batch_size"]
    return JobConfig(
        job=Job(dump_folder=job["run_dir"]),
        metrics=Metrics(log_freq=job["log_every_steps"], disable_color_printing=True),
        model=Model(name="bench", flavor="bench"),
        optimizer=Optimizer(
            name="AdamW",
            lr=job["lr"],
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=job["weight_decay"],
            implementation="fused",
        ),
        lr_scheduler=LRScheduler(warmup_steps=0, decay_ratio=0.0),
        training=Training(
            local_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * job.get("micro_batches", 1),
            seq_len=job["seq_len"],
            max_norm=1.0,
            steps=job["steps"],
            mixed_precision_param="bfloat16" if job["precision"] == "bf16" else "float32",
            mixed_precision_reduce="float32",
        ),
        activation_checkpoint=ActivationCheckpoint(mode=job.get("checkpointing", "none")),
        compile=Compile(enable=job["compile"], components=["model", "loss"]),
        debug=Debug(seed=job["seed"]),
    )


class Recording(Trainer):
    """The Trainer, with each micro-batch's share of its step's loss kept, and the most memory: its log resets torch's mark."""

    def __init__(self, job_config: JobConfig) -> None:
        super().__init__(job_config)
        self.seen: list[torch.Tensor] = []
        self.peak_gpu_bytes = 0

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """The Trainer's."""
        loss = super().forward_backward_step(**batch)
        self.seen.append(loss.detach())
        if torch.cuda.is_available():
            self.peak_gpu_bytes = max(self.peak_gpu_bytes, torch.cuda.max_memory_allocated())
        return loss

    def step_losses(self) -> list[float]:
        """The loss of each step so far."""
        return torch.stack(self.seen).view(-1, self.gradient_accumulation_steps).sum(1).tolist()


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    if job["model"]["family"] != "llama":
        raise SystemExit(f"torchtitan has no model of the family {job['model']['family']}, only Llama is compared here")
    if job["resumed_at"] or job["initial_weights"] or job["save"] or os.environ["WORLD_SIZE"] != "1":
        raise SystemExit("torchtitan runs here on one GPU, from its own initial weights, without checkpoints")
    init_logger()
    register_train_spec("bench", spec(job))
    trainer = Recording(config(job))
    trainer.train()
    every = job["log_every_steps"]
    clock.extra["peak_gpu_bytes"] = trainer.peak_gpu_bytes
    clock.write(job["steps"] - job["resumed_at"], trainer.step_losses()[every - 1 :: every])
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
