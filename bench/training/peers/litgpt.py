"""litgpt's pretraining, its own entry point `litgpt.pretrain.setup`, under bench/training/compare.py's clock.

It compiles the model always; in eager cells TORCHDYNAMO_DISABLE=1 is set from outside. On CPUs it takes torch's AdamW unfused.
"""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch.utils.data import DataLoader

from bench.training.clock import Clock, Rows, read_job

NAMES = {
    "attention.out": "attn.proj",
    "attention_norm": "norm_1",
    "mlp_norm": "norm_2",
    "mlp.gate": "mlp.fc_1",
    "mlp.up": "mlp.fc_2",
    "mlp.out": "mlp.proj",
}


def sizes(model: dict[str, Any]) -> Config:
    """Our model's sizes as litgpt names them."""
    return Config(
        name="bench",
        block_size=model["seq_len"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        n_layer=model["num_layers"],
        n_head=model["num_heads"],
        n_embd=model["hidden_size"],
        intermediate_size=model["mlp_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under litgpt's names."""
    result = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for name, value in weights.items():
        if not name.startswith("blocks."):
            continue
        _, layer, rest = name.removesuffix(".weight").split(".", 2)
        if rest == "attention.query":
            three = [weights[f"blocks.{layer}.attention.{part}.weight"] for part in ("query", "key", "value")]
            result[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat(three)
        elif rest in NAMES:
            result[f"transformer.h.{layer}.{NAMES[rest]}.weight"] = value
    return result


class Samples(DataModule):
    """Rows as litgpt takes them."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.rows, self.batch_size = Rows(job), 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """Called by litgpt."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """All rows in order."""
        return DataLoader(self.rows, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """litgpt validates two batches before it begins."""
        return DataLoader(self.rows, batch_size=self.batch_size)


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    out, tokens = Path(job["run_dir"]), job["steps"] * job["micro_batch_size"] * job["seq_len"]
    weights = out / "initial" if job["initial_weights"] and not job["resumed_at"] else None
    if weights is not None:
        weights.mkdir(parents=True, exist_ok=True)
        torch.save(renamed(torch.load(job["initial_weights"])), weights / "lit_model.pth")
    sys.argv = ["litgpt", "pretrain", "pythia-14m"]  # litgpt writes the words it was called with beside its checkpoints
    optimizer = {"lr": job["lr"], "betas": [0.9, 0.95], "weight_decay": job["weight_decay"]}
    setup(
        "bench",
        model_config=sizes(job["model"]),
        out_dir=out,
        precision="bf16-mixed" if job["precision"] == "bf16" else "32-true",
        initial_checkpoint_dir=weights,
        resume="auto" if job["resumed_at"] else False,
        data=Samples(job),
        train=TrainArgs(
            save_interval=job["steps"] if job["save"] else None,
            log_interval=job["log_every_steps"],
            global_batch_size=job["micro_batch_size"],
            micro_batch_size=job["micro_batch_size"],
            max_tokens=tokens,
            max_norm=1.0,
            min_lr=job["lr"],
            lr_warmup_steps=0,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": optimizer},
        devices=int(os.environ["WORLD_SIZE"]),
        logger_name="csv",
        seed=job["seed"],
    )
    logs = sorted(out.glob("logs/csv/version_*/metrics.csv"))
    with logs[-1].open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    clock.write(job["steps"] - job["resumed_at"], losses)


if __name__ == "__main__":
    main()
