"""litgpt's own entry point `litgpt.finetune.lora.setup`, under bench/finetune/compare.py's clock.

Its converter makes its checkpoint of the folder that export_model has written. LoRA's first factors stand in that checkpoint;
query, key and value share one layer there, whose factor A is ours one below the other. Two things are not in litgpt and are put
in from outside: clipping, before each update, and a cosine without a warm-up, as its own gives the first update a rate of 0.
"""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import litgpt.finetune.lora as finetuning
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import name_to_config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from bench.finetune.peers.rows import ChatRows, first_factors
from bench.training.clock import Clock, read_job, resident_bytes
from bench.training.peers.litgpt import NAMES, sizes

QKV = ("attention.query", "attention.key", "attention.value")


class Chats(ChatRows):
    """Rows with the counts that litgpt wants beside them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {**row, "token_counts": {"raw": len(row["labels"]), "raw_plus_prompt_template": len(row["labels"])}}


class ChatData(DataModule):
    """Rows as litgpt takes them."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.rows, self.batch_size, self.prompt_style = Chats(job), 1, None

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """Called by litgpt."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """All rows in order."""
        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader:
        """litgpt validates two batches before it begins."""
        return self.train_dataloader()


def convert(job: dict[str, Any], folder: Path) -> None:
    """litgpt's checkpoint, with the first factors in it."""
    shutil.copytree(job["start_folder"], folder)
    config = sizes(job["model"])
    fields = ("block_size", "vocab_size", "padded_vocab_size", "n_layer", "n_head", "n_embd", "intermediate_size")
    fixed = {
        "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
        "norm_eps": config.norm_eps, "mlp_class_name": "LLaMAMLP", "hf_config": {},
    }  # fmt: skip
    name_to_config["bench"] = {"name": "bench", **{field: getattr(config, field) for field in fields}, **fixed}
    convert_hf_checkpoint(folder, model_name="bench")
    weights = dict(torch.load(folder / "lit_model.pth", mmap=False))
    factors = first_factors(job)
    for number in range(job["model"]["num_layers"]):
        block, theirs = f"blocks.{number}", f"transformer.h.{number}"
        weights[f"{theirs}.attn.qkv.lora_A"] = torch.cat([factors.pop(f"{block}.{name}") for name in QKV])
        for ours, name in NAMES.items():
            if not ours.endswith("norm"):
                weights[f"{theirs}.{name}.lora_A"] = factors.pop(f"{block}.{ours}")
    if factors:
        raise SystemExit(f"a factor without a layer: {next(iter(factors))}")
    torch.save(weights, folder / "lit_model.pth")


def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gradients to a norm of 1, as every other contender has it."""
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    clock.extra["imported_rss_bytes"] = resident_bytes()
    out = Path(job["run_dir"])
    out.mkdir(parents=True)
    convert(job, out / "start")
    register_optimizer_step_pre_hook(clip)
    finetuning.get_lr_scheduler = lambda optimizer, warmup_steps, max_steps: CosineAnnealingLR(optimizer, T_max=max_steps)
    finetuning.merge_lora = lambda **_: None  # after the last update, which no other contender does
    finetuning.save_prompt_style = lambda *_: None  # the rows are chats already
    sys.argv = ["litgpt", "finetune_lora", str(out / "start")]  # litgpt writes the words it was called with
    optimizer = {"lr": job["lr"], "betas": [0.9, 0.95], "weight_decay": job["weight_decay"], "fused": True}
    finetuning.setup(
        checkpoint_dir=out / "start",
        out_dir=out / "tuned",
        precision="32-true",
        lora_r=job["lora"]["rank"],
        lora_alpha=job["lora"]["alpha"],
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=ChatData(job),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job["micro_batch_size"],
            micro_batch_size=job["micro_batch_size"],
            lr_warmup_steps=0,
            epochs=1,
            max_steps=job["steps"],
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": optimizer},
        devices=1,
        logger_name="csv",
        seed=job["seed"],
    )
    logs = sorted(out.glob("tuned/logs/csv/version_*/metrics.csv"))
    with logs[-1].open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    clock.write(job["steps"], losses)


if __name__ == "__main__":
    main()
