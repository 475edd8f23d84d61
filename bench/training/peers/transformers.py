"""transformers' Trainer with its own Llama, as its documentation shows it, under bench/training/compare.py's clock.

Layouts: ddp (plain Trainer), zero1 to zero3 (its DeepSpeed integration).
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench.training.clock import Clock, Rows, read_job

NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.out": "mlp.down_proj",
}


def llama(model: dict[str, Any]) -> LlamaConfig:
    """Our model's sizes as transformers names them."""
    return LlamaConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["mlp_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model.get("num_kv_heads") or model["num_heads"],
        max_position_embeddings=model["seq_len"],
        rms_norm_eps=model.get("norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=model.get("tied_head", True),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


GPT2_NAMES = {
    "vocab_size": "vocab_size", "seq_len": "n_positions", "hidden_size": "n_embd", "num_layers": "n_layer",
    "num_heads": "n_head",
}  # fmt: skip


def gpt2(model: dict[str, Any]) -> GPT2Config:
    """The same for the GPT-2 family."""
    sizes = {theirs: model[ours] for ours, theirs in GPT2_NAMES.items()}
    return GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def build(job: dict[str, Any]) -> torch.nn.Module:
    """The model; a Llama with our initial weights, so that its losses can be compared with ours."""
    if job["model"]["family"] == "gpt2":
        return GPT2LMHeadModel(gpt2(job["model"]))
    model = LlamaForCausalLM(llama(job["model"]))
    if job["initial_weights"]:
        model.load_state_dict(renamed(torch.load(job["initial_weights"])), strict=True)
    return model


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under transformers' names."""
    result = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            result[f"model.layers.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"] = value
    return result


class Samples(Rows):
    """Rows as the Trainer takes them."""

    def __getitem__(self, index: int) -> Any:
        tokens = super().__getitem__(index)
        return {"input_ids": tokens[:-1], "labels": tokens[1:], "shift_labels": tokens[1:]}


class Recording(Trainer):
    """The Trainer, with each step's loss kept: its own log has means over several steps."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's."""
        if not hasattr(self, "seen"):
            self.seen: list[torch.Tensor] = []
        loss = super().compute_loss(*args, **kwargs)
        self.seen.append(loss.detach())
        return loss


def arguments(job: dict[str, Any]) -> TrainingArguments:
    """The same schedule, clipping, precision and logging as every contender."""
    layout: dict[str, Any] = {}
    if job["layout"].startswith("zero"):
        # Gradients are added in fp32, as by every contender; DeepSpeed's own default is bf16.
        sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        bf16 = {"bf16": {"enabled": True}, **sums} if job["precision"] == "bf16" else {}
        layout["deepspeed"] = {
            "zero_optimization": {"stage": int(job["layout"][-1])},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            **bf16,
        }
    return TrainingArguments(
        output_dir=job["run_dir"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["micro_batch_size"],
        learning_rate=job["lr"],
        lr_scheduler_type=job.get("schedule", "constant"),
        weight_decay=job["weight_decay"],
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=job["precision"] == "bf16",
        torch_compile=job["compile"],
        use_cpu=job["device"] == "cpu",
        ddp_backend="gloo" if job["device"] == "cpu" else "nccl",
        gradient_checkpointing=job.get("checkpointing", "none") == "full",
        logging_steps=job["log_every_steps"],
        save_strategy="steps" if job["save"] else "no",
        save_steps=job["steps"],
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        seed=job["seed"],
        disable_tqdm=True,
        **layout,
    )


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    transformers.logging.set_verbosity_error()
    trainer = Recording(model=build(job), args=arguments(job), train_dataset=Samples(job))
    trainer.train(resume_from_checkpoint=True if job["resumed_at"] and Path(job["run_dir"]).exists() else None)
    every = job["log_every_steps"]
    clock.write(job["steps"] - job["resumed_at"], trainer.seen[every - 1 :: every])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads otherwise abort some processes as they end


if __name__ == "__main__":
    main()
