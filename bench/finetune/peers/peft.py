"""transformers' Trainer, with peft for LoRA, as their documentation shows it, under bench/finetune/compare.py's clock.

It opens the folder that export_model has written. peft draws its own first factors; they are replaced by ours.
"""

from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.finetune.peers.rows import ChatRows, first_factors
from bench.training.clock import Clock, read_job, resident_bytes
from bench.training.peers.transformers import NAMES, Recording, arguments


def build(job: dict[str, Any]) -> torch.nn.Module:
    """The model, with adapters where the job has some."""
    model = AutoModelForCausalLM.from_pretrained(job["start_folder"], dtype=torch.float32)
    model.config.use_cache = False
    if not job["lora"]:
        return model
    leaves = [name.rpartition(".")[2] for ours, name in NAMES.items() if not ours.endswith("norm")]
    config = peft.LoraConfig(
        r=job["lora"]["rank"], lora_alpha=job["lora"]["alpha"], target_modules=leaves, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for layer, factor in first_factors(job).items():
            _, number, rest = layer.split(".", 2)
            name = f"base_model.model.model.layers.{number}.{NAMES[rest]}.lora_A.default.weight"
            parameters.pop(name).copy_(factor)
    if left := [name for name in parameters if ".lora_A." in name]:
        raise SystemExit(f"no first factor for {left[0]}")
    return adapted


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    clock.extra["imported_rss_bytes"] = resident_bytes()
    transformers.logging.set_verbosity_error()
    trainer = Recording(model=build(job), args=arguments(job), train_dataset=ChatRows(job))
    trainer.train()
    clock.write(job["steps"], trainer.seen)


if __name__ == "__main__":
    main()
