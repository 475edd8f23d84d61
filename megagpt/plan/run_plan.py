"""The plan of a whole run: memory, traffic, time, cost and checkpoints, from its configuration and the GPUs alone."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, model_validator

from megagpt.config import UserError
from megagpt.distributed.mesh import refuse_groups
from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.engine.optim import OPTIMIZERS
from megagpt.model.flops import FlopsPerToken, flops_per_token
from megagpt.plan.communication import Traffic, step_traffic, traffic_seconds
from megagpt.plan.hardware import Gpu, efficiency_of, find_gpu, find_network, hardware
from megagpt.plan.memory import plan_memory
from megagpt.plan.sbatch import gpus_asked, sbatch_options
from megagpt.plan.speed import StepTime, Workload, block_flops, step_time
from megagpt.plan.timeline import Job, MemoryPlan, shapes_of, state_bytes
from megagpt.train.config import TrainConfig
from megagpt.train.preflight import export_bytes

GIB = 2**30
NEARLY_FULL = 0.9
"""Planned share of a GPU's memory above which the plan warns: the parts that were not measured may be larger."""


class PlanConfig(TrainConfig):
    """A training run, and the GPUs it is planned for."""

    gpus: int | None = Field(default=None, gt=0)
    """Number of GPUs, one rank each; null = the number that `sbatch` asks for, or nodes x the GPUs of a usual node."""
    nodes: int | None = Field(default=None, gt=0)
    """Number of nodes; null = as many as the GPUs fill."""
    gpu: str = "h100_80gb"
    """Kind of GPU, a name of megagpt/plan/hardware.yaml. With another name the plan has no times."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of a GPU in GiB; null = the value of hardware.yaml."""
    node_memory_gib: float | None = Field(default=None, gt=0)
    """Host memory of a node in GiB; null = what --mem or --mem-per-gpu of `sbatch` asks for; without either it
    is not checked."""
    network: str | None = None
    """Network between nodes, a name of hardware.yaml; null = the usual one of the GPU."""
    network_gb_per_second: float | None = Field(default=None, gt=0)
    """Bandwidth from a node to the others in GB/s, one direction; replaces that of `network`."""
    price_per_gpu_hour: float | None = Field(default=None, gt=0)
    """Price of a GPU per hour, in any currency; null = the plan shows no cost."""
    storage_gb_per_second: float | None = Field(default=None, gt=0)
    """Write bandwidth of the disk of run_dir in GB/s, all ranks together; null = the plan shows no times of checkpoints."""
    sweep: tuple[int, ...] = ()
    """Numbers of GPUs to compare in a table, e.g. [8,16,32,64]."""
    plot: Path | None = None
    """File for a plot of the sweep (.svg, .png); null = none."""
    fit: bool = False
    """Search for the fastest micro-batch size, checkpointing and sharding that fit, and write them as a configuration."""
    output: Path = Path("planned.yaml")
    """The configuration that fit=true writes."""
    preflight: bool = False
    """Check the whole job for these GPUs, disk and data included; exit status 2 if something is wrong."""
    sbatch: str = ""
    """Options that the job is submitted with: --nodes, --gpus-per-node, --time, --signal."""
    script: Path | None = None
    """Job script whose shell syntax and #SBATCH lines the preflight checks."""
    summary: bool = False
    """Print six lines instead of the whole plan."""

    @model_validator(mode="after")
    def _check_gpus(self) -> "PlanConfig":
        if self.gpus is not None and self.nodes is not None and self.gpus % self.nodes:
            raise ValueError(f"gpus={self.gpus} is not a multiple of nodes={self.nodes}")
        if any(count < 1 for count in self.sweep):
            raise ValueError(f"sweep={list(self.sweep)}: numbers of GPUs are at least 1")
        return self

    def train_config(self) -> TrainConfig:
        """The run without its plan."""
        return TrainConfig.model_validate({name: getattr(self, name) for name in TrainConfig.model_fields})


@dataclass(frozen=True, slots=True)
class Cluster:
    """The GPUs of a plan."""

    gpus: int
    gpus_per_node: int
    name: str
    gpu: Gpu | None
    memory_gib: float | None
    network_bandwidth: float | None
    """Bytes per second of a node, one direction."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run needs and how long it takes. Times are None if no published runs on the GPU are known."""

    parameters: int
    flops: FlopsPerToken
    accumulation: int
    memory: MemoryPlan
    needed_gib: float
    capacity_gib: float | None
    traffic: tuple[Traffic, ...]
    step: StepTime | None
    tokens_per_second: float | None
    """Of all GPUs together."""
    mfu: float | None
    """Full convention, 0 to 1."""
    seconds: float | None
    """Of the whole run, without evaluation, saving and failures."""
    error: float | None
    """Relative error of planned speed that nine of ten held-back published runs stay below, e.g. 0.08."""
    tokens: int
    checkpoint_bytes: int
    save_copy_bytes: int
    """Host memory per GPU for background saves."""
    export_bytes: int
    """Of all exports during training that are on the disk at once."""
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into the GPU's memory; None if that is not known."""
        return None if self.capacity_gib is None else self.needed_gib <= self.capacity_gib

    @property
    def host_bytes(self) -> int:
        """Host memory per GPU: offloaded states, and the copy for background saves."""
        return self.memory.host + self.save_copy_bytes


def cluster_of(config: PlanConfig, gpus: int | None = None) -> Cluster:
    """The GPUs that the configuration asks for, or another number of them. Raises UserError on an unknown network."""
    gpu = find_gpu(config.gpu)
    usual = gpu.gpus_per_node if gpu else 8
    asked = gpus_asked(sbatch_options(config.sbatch))
    if gpus is None and config.gpus is None and config.nodes is None and asked is not None:
        gpus, per_node = asked[0] * asked[1], asked[1]
    elif gpus is None:
        gpus = config.gpus or (config.nodes or 1) * usual
        nodes = config.nodes or -(-gpus // usual)
        per_node = gpus // nodes if gpus % nodes == 0 else usual
    else:
        per_node = min(gpus, usual)
    if config.network_gb_per_second is not None:
        bandwidth: float | None = config.network_gb_per_second * 1e9
    elif config.network is not None or gpu is not None:
        name = config.network or (gpu.network if gpu else "")
        bandwidth = find_network(name).gb_per_second * 1e9
    else:
        bandwidth = None
    memory = config.gpu_memory_gib or (gpu.memory_gib if gpu else None)
    return Cluster(gpus, per_node, config.gpu, gpu, memory, bandwidth)


def job_of(config: TrainConfig, ranks: int, global_batch_size: int | None = None) -> Job:
    """What the memory and traffic of a run on `ranks` GPUs depend on. Raises UserError if groups do not divide them."""
    engine = config.engine
    if isinstance(engine, FSDPConfig) and engine.shard_size is not None and ranks % engine.shard_size:
        raise UserError(f"engine.shard_size={engine.shard_size} does not divide the {ranks} ranks")
    if isinstance(engine, DeepSpeedConfig) and ranks % engine.hpz_partition_size:
        raise UserError(f"engine.hpz_partition_size={engine.hpz_partition_size} does not divide the {ranks} ranks")
    refuse_groups(ranks, engine.context_parallel_size)
    groups = ranks // engine.context_parallel_size
    micro_batches = -(-(global_batch_size or config.global_batch_size) // config.micro_batch_size)
    return Job(
        config.model,
        engine,
        config.optim,
        config.precision,
        config.micro_batch_size,
        config.data.seq_len // engine.context_parallel_size,
        ranks,
        accumulation=-(-micro_batches // groups),
        checkpoint_every=config.checkpoint_every,
        checkpoint_selectively=config.activation_checkpointing == "selective",
        documents=config.data.document_mask,
    )


def planned_parts(config: TrainConfig, ranks: int, kernels: str) -> dict[str, int]:
    """Bytes by part at the peak of a step, on one of `ranks` GPUs (kernels="gpu") or processes (kernels="cpu")."""
    return plan_memory(replace(job_of(config, ranks), kernels="gpu" if kernels == "gpu" else "cpu")).parts


def make_plan(config: TrainConfig, cluster: Cluster) -> RunPlan:
    """The plan of a run on these GPUs. Raises UserError if the engine's groups do not divide them."""
    job = job_of(config, cluster.gpus)
    shapes = shapes_of(config.model)
    parameters = sum(shape.numel() for shape in shapes.values())
    memory, assumptions = plan_memory(job), hardware().assumptions
    flops = flops_per_token(
        config.model,
        seq_len=config.data.seq_len,
        checkpoint_every=job.checkpoint_every,
        checkpoint_selectively=job.checkpoint_selectively,
    )
    notes = [
        f"memory: tensors as planned, {assumptions.allocator_margin:.0%} for the allocator and {assumptions.context_gib} GiB"
        " for the context and NCCL, which were not measured"
    ]
    efficiency = efficiency_of(cluster.gpu) if cluster.gpu else None
    step = rate = mfu = seconds = None
    if cluster.gpu is None:
        notes.append(
            f"gpu={cluster.name} is not in hardware.yaml: the plan has no times, and no limit unless gpu_memory_gib is given"
        )
    elif efficiency is None:
        notes.append(f"gpu={cluster.name}: no published runs are known, so the plan has no times")
    elif _offloads(config):
        notes.append("states are offloaded to host memory: no published runs are known, so the plan has no times")
    else:
        step = _step_time(config, cluster, job, parameters)
        rate = config.global_batch_size * config.data.seq_len / step.total
        mfu = flops.full * rate / cluster.gpus / (cluster.gpu.bf16_tflops * 1e12)
        seconds = _run_seconds(config, cluster, parameters)
        notes.append(
            f"time: efficiencies of {efficiency.rows} published runs on {cluster.gpu.name}, up to {efficiency.max_gpus} GPUs;"
            f" planned and published speed differ by {efficiency.median_error:.1%} (median) in the half that was held back"
        )
        notes += _time_notes(config, cluster, efficiency.max_gpus, efficiency.float8_speedup)
    if OPTIMIZERS[config.optim.kind].matrices_only:
        notes.append(f"memory: the whole matrices that {config.optim.kind} updates one by one are not counted")
    if config.engine.context_parallel_size > 1:
        notes.append("memory: the buffers of context parallelism's exchange around attention are not counted")
        notes.append("time: no published runs with context parallelism are known; its traffic is planned like any other")
    if config.determinism == "canonical":
        notes.append("determinism=canonical reduces each micro-batch separately: its buffers and time are not counted")
    if config.compile:
        notes.append("compile=true: fused operations keep fewer activations than are counted, and run faster")
    needed = memory.peak * (1 + assumptions.allocator_margin) / GIB + assumptions.context_gib
    if cluster.memory_gib is not None and NEARLY_FULL * cluster.memory_gib < needed <= cluster.memory_gib:
        notes.append(
            f"memory: {needed / cluster.memory_gib:.0%} of the GPU is planned to be in use. The allocator may then free and"
            " request memory in every step, which is slow and not in the times; a smaller micro-batch or more GPUs leave room"
        )
    checkpoint_bytes = sum((4 + state_bytes(config.optim, name, s)) * s.numel() for name, s in shapes.items())
    return RunPlan(
        parameters=parameters,
        flops=flops,
        accumulation=job.accumulation,
        memory=memory,
        needed_gib=needed,
        capacity_gib=cluster.memory_gib,
        traffic=tuple(step_traffic(job)),
        step=step,
        tokens_per_second=rate,
        mfu=mfu,
        seconds=seconds,
        error=efficiency.p90_error if efficiency and step else None,
        tokens=config.num_samples() * config.data.seq_len,
        checkpoint_bytes=checkpoint_bytes,
        save_copy_bytes=-(-checkpoint_bytes // cluster.gpus) if config.save_in_background else 0,
        export_bytes=export_bytes(config, sum(s.numel() for s in shapes.values())),
        notes=tuple(notes),
    )


def save_interval_seconds(plan: RunPlan, gpus: int, storage_gb_per_second: float) -> tuple[float, float]:
    """(seconds to write a checkpoint, seconds between checkpoints that lose the least time; Daly 2006, first order)."""
    write = plan.checkpoint_bytes / (storage_gb_per_second * 1e9)
    between_failures = hardware().assumptions.hours_between_failures_of_a_gpu * 3600 / gpus
    return write, math.sqrt(2 * write * between_failures)


def _offloads(config: TrainConfig) -> bool:
    engine = config.engine
    return engine.cpu_offload if isinstance(engine, FSDPConfig) else engine.offload_optimizer


def _time_notes(config: TrainConfig, cluster: Cluster, max_gpus: int, float8_speedup: float | None) -> list[str]:
    notes = []
    if cluster.gpus > max_gpus:
        notes.append(f"time: {cluster.gpus} GPUs are more than the {max_gpus} of the largest published run: extrapolated")
    if isinstance(config.engine, DeepSpeedConfig):
        notes.append("time: the published runs used FSDP; none with DeepSpeed is known")
    if config.float8 != "none" and float8_speedup is None:
        notes.append(f"time: float8={config.float8}: no published runs on this GPU are known, planned as bf16")
    if config.precision == "fp32":
        notes.append("time: precision=fp32 is planned as bf16: it is slower")
    if config.data.document_mask:
        notes.append("time: attention is counted over whole samples; document masks reduce it")
    return notes


def _run_seconds(config: TrainConfig, cluster: Cluster, parameters: int) -> float:
    """Seconds of all steps, batch warmup included."""
    seconds, start = 0.0, 0
    phases = [(phase.until_step, phase.global_batch_size) for phase in config.batch_warmup]
    for until, size in [*phases, (config.max_steps, config.global_batch_size)]:
        steps = max(0, min(until, config.max_steps) - start)
        if steps:
            seconds += steps * _step_time(config, cluster, job_of(config, cluster.gpus, size), parameters).total
        start = max(start, until)
    return seconds


def _step_time(config: TrainConfig, cluster: Cluster, job: Job, parameters: int) -> StepTime:
    gpu = cluster.gpu
    assert gpu is not None
    efficiency = efficiency_of(gpu)
    assert efficiency is not None
    model = config.model
    products, attention = block_flops(model, config.data.seq_len)
    repeated = -(-model.num_layers // job.checkpoint_every) / model.num_layers if job.checkpoint_every else 0.0

    def seconds(accumulation: int) -> float:
        return traffic_seconds(
            step_traffic(replace(job, accumulation=accumulation)),
            gpus_per_node=cluster.gpus_per_node,
            node_bandwidth=gpu.node_gb_per_second * 1e9,
            network_bandwidth=cluster.network_bandwidth or 0.0,
        )

    once, twice = seconds(1), seconds(2)
    work = Workload(
        layers=model.num_layers,
        width=model.hidden_size,
        vocab_size=len(model.classes) or model.vocab_size,
        parameters=parameters,
        block_products=products,
        block_attention=attention,
        repeated_products=0.0 if job.checkpoint_selectively else repeated,
        repeated_elementwise=repeated,
        micro_batch_tokens=job.micro_batch_size * job.seq_len,
        accumulation=job.accumulation,
        ranks=_shards(job),
        micro_batch_traffic_seconds=twice - once,
        step_traffic_seconds=once - (twice - once),
        products_speedup=(efficiency.float8_speedup or 1.0) if config.float8 != "none" else 1.0,
    )
    return step_time(work, gpu, efficiency)


def _shards(job: Job) -> int:
    if isinstance(job.engine, FSDPConfig):
        return job.engine.shard_size or job.ranks
    return job.ranks if job.engine.zero_stage else 1
