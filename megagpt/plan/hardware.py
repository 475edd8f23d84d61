"""Facts about GPUs and networks from hardware.yaml: sizes, peaks, bandwidths, efficiencies fitted to published runs."""

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
    """Seconds that collectives add to a step, divided by their seconds at full bandwidth; above 1 if they do not reach it."""
    float8_speedup: float | None = Field(default=None, gt=0)
    """Speed of the blocks' matrix products in float8, as a multiple of bf16; null = not known."""
    median_error: float = Field(ge=0)
    """Median of |predicted / published - 1| of tokens per second, on the half of the published runs that was held back."""
    p90_error: float = Field(ge=0)
    """The 90th percentile of the same errors."""
    max_gpus: int = Field(gt=0)
    """GPUs of the largest published run."""
    rows: int = Field(gt=0)
    """Number of published runs, in both halves."""


class Gpu(Config):
    """One kind of GPU. All rates are of one GPU."""

    name: str
    """Its full name, for messages."""
    memory_gib: float = Field(gt=0)
    """Memory in GiB."""
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
    """null = no published runs are known: the plan then has no times."""
    efficiency_of: str | None = None
    """Take the efficiency of this GPU, measured with the same chip."""


class Network(Config):
    """The network between nodes."""

    gb_per_second: float = Field(gt=0)
    """Bandwidth of one node, all its adapters, one direction."""
    source: str
    """Where the figure is from."""


class Assumptions(Config):
    """Figures that were not measured; each plan names them."""

    allocator_margin: float = Field(ge=0)
    """Memory that the caching allocator holds beyond the tensors, as a share of their bytes."""
    context_gib: float = Field(ge=0)
    """CUDA context, libraries and NCCL's buffers on each GPU."""
    hours_between_failures_of_a_gpu: float = Field(gt=0)
    """GPU-hours per unexpected interruption."""
    source: str
    """Where the figures are from."""


class Hardware(Config):
    """All of hardware.yaml."""

    gpus: dict[str, Gpu]
    """By the name that the setting `gpu` takes."""
    networks: dict[str, Network]
    """By the name that the setting `network` takes."""
    assumptions: Assumptions
    """Figures that were not measured."""


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
    """The GPU's own efficiency, or that of the GPU with the same chip; None if there is neither."""
    if gpu.efficiency is None and gpu.efficiency_of is not None:
        return hardware().gpus[gpu.efficiency_of].efficiency
    return gpu.efficiency


def find_network(name: str) -> Network:
    """The network of that name. Raises UserError if it is not in the table."""
    networks = hardware().networks
    if name not in networks:
        raise UserError(f"network={name}: one of {', '.join(networks)} is expected, or network_gb_per_second=...")
    return networks[name]
