"""FLOPs of one training token, the bf16 peaks of known GPUs, and model FLOPs utilisation (MFU) in three conventions."""

import re
from dataclasses import dataclass

from megagpt.model.gpt import ModelConfig

_BF16_DENSE_PEAKS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA (H100 80GB HBM3|H100 SXM5.*|H200|H800|GH200.*)", 989.0),
    (r"NVIDIA H200 NVL", 835.0),
    (r"NVIDIA H100 NVL", 835.0),
    (r"NVIDIA H100 PCIe", 756.0),
    (r"NVIDIA H20", 148.0),
    (r"NVIDIA (A100|A800)(-SXM4|-PCIE|-PG509)?(-\d+GB)?", 312.0),
    (r"NVIDIA A100 80GB PCIe", 312.0),
    (r"NVIDIA (B200|HGX B200)", 2250.0),
    (r"NVIDIA GB200", 2500.0),
    (r"NVIDIA B100", 1750.0),
    (r"NVIDIA L40S", 362.0),
    (r"NVIDIA L4", 121.0),
    (r"NVIDIA A40", 149.7),
    (r"NVIDIA A30", 165.0),
    (r"NVIDIA A10", 125.0),
    (r"NVIDIA RTX A6000", 154.8),
    (r"NVIDIA GeForce RTX 4090", 165.2),
    (r"NVIDIA GeForce RTX 3090", 71.0),
)
"""(pattern of the whole device name, dense bf16 TFLOP/s with fp32 accumulation), from NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs that one training token takes, forward and backward, by three published conventions.

    full: matrix products and attention over all T x T pairs (PaLM, arXiv 2204.02311, appendix B; nanoGPT, llm.c).
    causal: attention over the T (T + 1) / 2 pairs that a causal model needs (OLMo-core, FlashAttention's benchmarks).
    hardware: full, plus the forward passes that activation checkpointing repeats (arXiv 2205.05198).
    """

    full: float
    causal: float
    hardware: float


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Shares of the peak, 0 to 1, in the three conventions of FlopsPerToken."""

    full: float
    causal: float
    hardware: float


def flops_per_token(
    config: ModelConfig, *, seq_len: int | None = None, checkpoint_every: int = 0, checkpoint_selectively: bool = False
) -> FlopsPerToken:
    """Training FLOPs per token of a sequence of `seq_len` tokens (None = config.seq_len).

    A multiply-add is 2 FLOPs; the backward pass is twice the forward. Counted are the matrix products of attention, MLP and
    head; left out are the embedding lookup, norms, rotations and softmax. Blocks 0, n, 2n … run forward twice when
    `checkpoint_every` = n > 0; the MLP's last product is not repeated (torch stops recomputing at the last tensor needed).
    With `checkpoint_selectively` products and attention are kept, so nothing that is counted is repeated.
    """
    length = seq_len or config.seq_len
    query_width, kv_width = config.num_heads * config.head_width, config.kv_heads * config.head_width
    projections = 2 * config.hidden_size * (2 * query_width + 2 * kv_width)
    mlp_out = 2 * config.hidden_size * config.mlp_width
    mlp = mlp_out * (3 if config.family == "llama" else 2)
    head = 2 * config.hidden_size * (len(config.classes) or config.vocab_size)
    attention = 2 * 2 * length * query_width
    block = projections + mlp + attention
    repeats = checkpoint_every and not checkpoint_selectively
    repeated_blocks = -(-config.num_layers // checkpoint_every) if repeats else 0
    full = 3 * (config.num_layers * block + head)
    skipped_pairs = 3 * config.num_layers * attention * (length - 1) / (2 * length)
    return FlopsPerToken(full=full, causal=full - skipped_pairs, hardware=full + repeated_blocks * (block - mlp_out))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that CUDA gives it; None for one that is not in the table (a MIG slice, say)."""
    for pattern, teraflops in _BF16_DENSE_PEAKS:
        if re.fullmatch(pattern, device_name):
            return teraflops * 1e12
    return None


def utilisation(flops: FlopsPerToken, tokens_per_second_per_device: float, peak: float) -> Utilisation:
    """MFU of one device: FLOPs per token x tokens per second / `peak` (FLOP/s)."""
    scale = tokens_per_second_per_device / peak
    return Utilisation(full=flops.full * scale, causal=flops.causal * scale, hardware=flops.hardware * scale)
