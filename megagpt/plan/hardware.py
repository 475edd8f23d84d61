"""What is known of GPUs and networks, from hardware.yaml: sizes, peaks, bandwidths, efficiencies fitted to published runs."""

from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field

from megagpt.config import Config, UserError, validate


class Efficiency(Config):
    """How much of its peaks a kind of GPU reaches in training, fitted by bench/plan/speed.py; see megagpt.plan.speed."""

    matmul: float = Field(gt=0)
    """Share of the bf16 peak that large matrix products reach."""
    half_tokens: float = Field(ge=0)
    """Tokens of a micro-batch at which matrix products reach half of that."""
    attention: float = Field(gt=0)
    """Share of the bf16 peak that attention reaches, counted over the causal half of the pairs."""
    block_bytes: float = Field(ge=0)
    """Bytes that a block moves through the GPU's memory per token and unit of width, matrix products aside."""
    exposed: float = Field(ge=0)
    """Seconds that the collectives add, over those that they take at full bandwidth; above 1 where they do not reach it."""
    float8_speedup: float | None = Field(default=None, gt=0)
    """How much faster blocks' products are in float8; null = not known."""
    median_error: float = Field(ge=0)
    """Median of |predicted / published - 1| of tokens per second, on the half of the published runs that was held back."""
    p90_error: float = Field(ge=0)
    """The same error, below which 90 % of them lie."""
    max_gpus: int = Field(gt=0)
    """GPUs of the largest published run."""
    rows: int = Field(gt=0)
    """Published runs, both halves."""


class Gpu(Config):
    """One kind of GPU. All rates are of one GPU."""

    name: str
    """What it is called."""
    memory_gib: float = Field(gt=0)
    """Memory."""
    bf16_tflops: float = Field(gt=0)
    """Dense bf16 peak, TFLOP/s."""
    memory_gb_per_second: float = Field(gt=0)
    """Bandwidth of its memory."""
    node_gb_per_second: float = Field(gt=0)
    """Bandwidth to the other GPUs of its node, one direction."""
    gpus_per_node: int = Field(gt=0)
    """GPUs of the usual node."""
    network: str
    """The usual network, a name under `networks`."""
    source: str
    """Where the figures are from."""
    efficiency: Efficiency | None = None
    """null = no published runs are known: there is a memory plan and no time."""
    efficiency_of: str | None = None
    """Take the efficiency of this GPU, measured with the same chip."""


class Network(Config):
    """The network between nodes."""

    gb_per_second: float = Field(gt=0)
    """Bandwidth of one node, all its adapters, one direction."""
    source: str
    """Where the figure is from."""


class Assumptions(Config):
    """Figures without a measurement behind them; each plan names them."""

    allocator_margin: float = Field(ge=0)
    """Share of the tensors' bytes that the caching allocator holds besides."""
    context_gib: float = Field(ge=0)
    """CUDA context, libraries and NCCL's buffers on each GPU."""
    hours_between_failures_of_a_gpu: float = Field(gt=0)
    """GPU-hours per unexpected interruption."""
    source: str
    """What they rest on."""


class Hardware(Config):
    """The whole file."""

    gpus: dict[str, Gpu]
    """By the name that the planner takes."""
    networks: dict[str, Network]
    """By the name that the planner takes."""
    assumptions: Assumptions
    """What nobody has measured here."""


@cache
def hardware() -> Hardware:
    """The packaged hardware.yaml."""
    import yaml

    text = files("megagpt.plan").joinpath("hardware.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return validate(Hardware, values, source="hardware.yaml")


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that name; None if it is not in the table."""
    return hardware().gpus.get(name)


def efficiency_of(gpu: Gpu) -> Efficiency | None:
    """Its efficiency, its own or that of the GPU it shares the chip with."""
    if gpu.efficiency is None and gpu.efficiency_of is not None:
        return hardware().gpus[gpu.efficiency_of].efficiency
    return gpu.efficiency


def find_network(name: str) -> Network:
    """The network of that name. Raises UserError if it is not in the table."""
    networks = hardware().networks
    if name not in networks:
        raise UserError(f"network={name}: one of {', '.join(networks)} is expected, or network_gb_per_second=...")
    return networks[name]
