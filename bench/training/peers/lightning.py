"""Lightning's Trainer around the same model class and optimizer as ours, under bench/training/compare.py's clock."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bench.training.clock import Clock, Rows, adamw, read_job
from megagpt.model.gpt import GPT, ModelConfig, initialise


class Module(lightning.LightningModule):
    """The model and its optimizer as Lightning wants them."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.job, self.seen = job, []
        self.model = GPT(ModelConfig(**job["model"]))
        initialise(self.model, job["seed"])
        for block in self.model.blocks if job["compile"] else ():
            block.compile()

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        """Mean loss of a batch of rows."""
        loss = self.model(tokens[:, :-1], tokens[:, 1:]) / (tokens.shape[0] * (tokens.shape[1] - 1))
        self.log("loss", loss)
        self.seen.append(loss.detach())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        """Lightning's own refuses fused optimizers in mixed precision; what it would do otherwise."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of every contender."""
        return adamw(self, self.job)


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    module = Module(job)
    callbacks = [ModelCheckpoint(job["run_dir"], every_n_train_steps=job["steps"], save_last=True)] if job["save"] else []
    trainer = lightning.Trainer(
        accelerator="gpu" if job["device"] == "cuda" else "cpu",
        devices=1,
        max_steps=job["steps"],
        gradient_clip_val=1.0,
        precision="bf16-mixed" if job["precision"] == "bf16" else "32-true",
        log_every_n_steps=job["log_every_steps"],
        default_root_dir=job["run_dir"],
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=lightning.pytorch.loggers.CSVLogger(job["run_dir"]),
    )
    loader = torch.utils.data.DataLoader(Rows(job), batch_size=job["micro_batch_size"])
    trainer.fit(module, loader, ckpt_path=f"{job['run_dir']}/last.ckpt" if job["resumed_at"] else None)
    every = job["log_every_steps"]
    clock.write(job["steps"] - job["resumed_at"], module.seen[every - 1 :: every])


if __name__ == "__main__":
    main()
