"""nanoGPT's way to train GPT-2 (github.com/karpathy/nanoGPT: model.py, train.py), in its own shape, under our clock.

Fused query-key-value product, scaled_dot_product_attention, tied head, whole logits with F.cross_entropy, the whole model
compiled, autocast to bf16 with fp32 weights, fused AdamW, clipping at 1; a batch is copied from pinned memory while the one
before it is computed.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.clock import Clock, Rows, adamw, read_job


class Block(nn.Module):
    """Pre-norm block of nanoGPT, without biases in norms and products (its default for training from scratch)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(width, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Model(nn.Module):
    """Embeddings, blocks, tied head, mean loss."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width = sizes["hidden_size"]
        self.tokens, self.positions = nn.Embedding(sizes["vocab_size"], width), nn.Embedding(sizes["seq_len"], width)
        self.blocks = nn.ModuleList(Block(width, sizes["num_heads"]) for _ in range(sizes["num_layers"]))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, sizes["vocab_size"], bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """[B, T] ids and targets -> mean loss."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def main() -> None:
    """Train."""
    job, clock = read_job(), Clock()
    torch.manual_seed(job["seed"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device, losses = job["device"], []
    model = Model(job["model"]).to(device)
    optimizer = adamw(model, job)
    forward = torch.compile(model) if job["compile"] else model
    rows, batch_size, micro_batches = Rows(job), job["micro_batch_size"], job.get("micro_batches", 1)

    def batch(number: int) -> Tensor:
        """Rows of one micro-batch on the device."""
        first = number * batch_size % max(1, len(rows) - batch_size)
        tokens = torch.stack([rows[first + i] for i in range(batch_size)])
        return tokens.pin_memory().to(device, non_blocking=True) if device == "cuda" else tokens

    tokens, number = batch(0), 0
    for step in range(job["steps"]):
        for _ in range(micro_batches):
            with torch.autocast(device, torch.bfloat16) if job["precision"] == "bf16" else nullcontext():
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / micro_batches
            number += 1
            tokens = batch(number)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % job["log_every_steps"] == 0:
            losses.append(loss.item() * micro_batches)
    clock.write(job["steps"], losses)


if __name__ == "__main__":
    main()
