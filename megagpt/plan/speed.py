"""How long a step takes: products, attention, memory traffic and collectives, at efficiencies fitted to published runs.

    seconds of a micro-batch = products / (peak x matmul x tokens / (tokens + half_tokens))
                             + attention / (peak x attention)
                             + (tokens x layers x width x block_bytes + logits) / memory bandwidth
    seconds of a step        = accumulation x that + exposed x traffic + optimizer's bytes / memory bandwidth

megagpt/plan/hardware.yaml holds the efficiencies; bench/plan/speed.py fits and scores them. Without published runs on a kind
of GPU, no time is planned.
"""

from dataclasses import dataclass

from megagpt.model.gpt import ModelConfig
from megagpt.plan.hardware import Efficiency, Gpu

LOGIT_BYTES = 20
"""Bytes that the loss moves per logit: the softmax writes, reads and rewrites it in fp32, and its gradient is read twice."""
UPDATE_BYTES = 28
"""Bytes that an update moves per element of a shard: it reads weight, gradient and two moments in fp32, and writes three."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of fused attention's backward pass divided by its forward pass's: it recomputes the scores (arXiv 2205.14135)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of one GPU in a step, independent of any framework."""

    layers: int
    width: int
    vocab_size: int
    parameters: int
    block_products: float
    """FLOPs of a block's matrix products per token, forward."""
    block_attention: float
    """FLOPs of a block's attention per token over all T x T pairs, forward."""
    repeated_products: float
    """Block forward passes whose products are repeated, as a share of the layers."""
    repeated_elementwise: float
    """The same for the operations between the products."""
    micro_batch_tokens: int
    accumulation: int
    ranks: int
    """Ranks that share the states."""
    micro_batch_traffic_seconds: float
    step_traffic_seconds: float
    products_speedup: float = 1.0
    """Speedup of the blocks' products by float8; 1 = none."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by part."""

    products: float
    attention: float
    elementwise: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.products + self.attention + self.elementwise + self.communication + self.update


def step_time(work: Workload, gpu: Gpu, efficiency: Efficiency) -> StepTime:
    """Seconds of one step on one GPU."""
    peak, bandwidth = gpu.bf16_tflops * 1e12, gpu.memory_gb_per_second * 1e9
    tokens = work.micro_batch_tokens
    rate = peak * efficiency.matmul * tokens / (tokens + efficiency.half_tokens)
    head = 3 * 2 * work.width * work.vocab_size
    blocks = work.layers * work.block_products * (3 + work.repeated_products) / work.products_speedup
    attention = work.layers * work.block_attention / 2 * (1 + work.repeated_products + BACKWARD_ATTENTION)
    moved = work.layers * work.width * efficiency.block_bytes * (1 + work.repeated_elementwise / 3)
    micro = tokens * work.accumulation
    return StepTime(
        products=micro * (blocks + head) / rate,
        attention=micro * attention / (peak * efficiency.attention),
        elementwise=micro * (moved + work.vocab_size * LOGIT_BYTES) / bandwidth,
        communication=efficiency.exposed * (work.accumulation * work.micro_batch_traffic_seconds + work.step_traffic_seconds),
        update=UPDATE_BYTES * work.parameters / work.ranks / bandwidth,
    )


def block_flops(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """FLOPs per token of one block's forward pass: (matrix products, attention over all pairs)."""
    query_width, kv_width = model.num_heads * model.head_width, model.kv_heads * model.head_width
    matrices = 3 if model.family == "llama" else 2
    products = 2 * model.hidden_size * (2 * query_width + 2 * kv_width + matrices * model.mlp_width)
    return float(products), float(2 * 2 * seq_len * query_width)
