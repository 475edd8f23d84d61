"""Check a job for all its ranks on one CPU before it is submitted: settings, batches, data, memory, disk, sbatch options."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from megagpt.config import UserError
from megagpt.data.open_data import open_data
from megagpt.engine.build import refuse_shared_samples, refuse_unsupported
from megagpt.files import show_bytes
from megagpt.model.float8 import refuse_float8
from megagpt.plan.run_plan import GIB, Cluster, PlanConfig, RunPlan
from megagpt.plan.sbatch import gpus_asked, node_bytes_asked, sbatch_options, slurm_seconds
from megagpt.train.config import TrainConfig
from megagpt.train.cross_checks import refuse_contradictions

MANY_EPOCHS = 4
"""Repeating data up to four times is about as good as new data (arXiv 2305.16264)."""
SIGNAL_SECONDS = 60
"""Shortest warning before the time limit in which a run can finish its update and save."""


def preflight_job(config: PlanConfig, cluster: Cluster, plan: RunPlan | UserError) -> list[str]:
    """The job's problems, one sentence each that says what to do; [] = no problem was found.

    `plan`: the run's plan, or the error with which planning ended (groups that do not divide the ranks).
    """
    run = config.train_config()
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: _settings(run),
        lambda: _batches(run, max(1, cluster.gpus // run.engine.context_parallel_size)),
        lambda: _schedule(run),
        lambda: _data(run),
        lambda: _sbatch(config, cluster),
    ]
    problems = [problem for check in checks for problem in check()]
    if isinstance(plan, UserError):
        return [str(plan), *problems]
    return [*problems, *_memory(plan), *_host_memory(config, cluster, plan), *_disk(run, plan)]


def _settings(config: TrainConfig) -> Iterator[str]:
    canonical = config.determinism == "canonical"
    try:
        refuse_unsupported(config.engine, config.optim, config.precision, canonical=canonical)
        refuse_shared_samples(config.engine, config.model, seq_len=config.data.seq_len, canonical=canonical)
        tokens = config.data.seq_len // config.engine.context_parallel_size
        refuse_float8(config.float8, config.model, config.precision, canonical=canonical, seq_len=tokens)
    except UserError as error:
        yield str(error)


def _batches(config: TrainConfig, ranks: int) -> Iterator[str]:
    """`ranks`: how many ranks read different samples; with context parallelism each of them is a group of ranks."""
    for name, size in config.batch_sizes():
        micro_batches = -(-size // config.micro_batch_size)
        if micro_batches < ranks:
            yield (
                f"{name}={size} is {micro_batches} micro-batches of {config.micro_batch_size} for {ranks} ranks:"
                f" {ranks - micro_batches} ranks would have none; raise it to {ranks * config.micro_batch_size}, or take fewer"
                " GPUs or a smaller micro_batch_size"
            )
        elif size % (config.micro_batch_size * ranks):
            unit = config.micro_batch_size * ranks
            yield (
                f"{name}={size} is not a multiple of micro_batch_size={config.micro_batch_size} x {ranks} ranks: in the last"
                f" micro-batch some wait for the others; take {size // unit * unit or unit} or {-(-size // unit) * unit}"
            )


def _schedule(config: TrainConfig) -> Iterator[str]:
    steps = config.max_steps
    for phase in config.batch_warmup:
        if phase.until_step >= steps:
            yield (
                f"batch_warmup: until_step={phase.until_step} is not less than max_steps={steps}: global_batch_size="
                f"{config.global_batch_size} is never used"
            )
    if config.save_every_steps > steps:
        every = config.save_every_steps
        yield f"save_every_steps={every} is more than max_steps={steps}: a failure loses the whole run; lower it"
    if config.keep_every_steps % config.save_every_steps:
        yield (
            f"keep_every_steps={config.keep_every_steps} is not a multiple of save_every_steps={config.save_every_steps}:"
            " no checkpoint is of such a step"
        )


def _data(config: TrainConfig) -> Iterator[str]:
    try:
        data = open_data(config.data)
    except UserError as error:
        yield str(error)
        return
    if data.vocab_size > config.model.vocab_size:
        multiple = -(-data.vocab_size // 64) * 64
        yield (
            f"model.vocab_size={config.model.vocab_size} is less than the {data.vocab_size} of the shards' tokenizer: set it to"
            f" {multiple}"
        )
    try:
        refuse_contradictions(config, data)
    except UserError as error:
        yield str(error)
    epochs = config.num_samples() / len(data.train)
    if epochs > MANY_EPOCHS:
        yield (
            f"max_steps={config.max_steps}: the run reads its {len(data.train):,} samples {epochs:.1f} times, more than"
            f" {MANY_EPOCHS} (arXiv 2305.16264); train for fewer steps or on more data"
        )


def source_epochs(config: TrainConfig) -> dict[str, float]:
    """How often the run reads each source, by name; {} if the shards are missing. Changes of weights are not counted."""
    try:
        data = open_data(config.data)
    except UserError:
        return {}
    total = sum(source.weight for source in config.data.sources.values())
    sizes = zip(config.data.sources.items(), data.train.datasets, strict=True)
    return {name: config.num_samples() * source.weight / total / len(dataset) for (name, source), dataset in sizes}


def _memory(plan: RunPlan) -> Iterator[str]:
    if plan.fits is False:
        largest = sorted(plan.memory.parts.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
        yield (
            f"memory: {plan.needed_gib:.1f} GiB are needed of {plan.capacity_gib:.1f} in the phase {plan.memory.phase}"
            f" ({parts}); fit=true searches settings that fit"
        )


def _host_memory(config: PlanConfig, cluster: Cluster, plan: RunPlan) -> Iterator[str]:
    """Python, CUDA and the loader need more on top, which is not planned."""
    gpus = min(cluster.gpus, cluster.gpus_per_node)
    asked = node_bytes_asked(sbatch_options(config.sbatch), gpus)
    there, source = (asked, "sbatch asks for") if asked is not None else (None, "")
    if config.node_memory_gib is not None:
        there, source = int(config.node_memory_gib * GIB), "node_memory_gib says"
    needed = gpus * plan.host_bytes
    if there is not None and needed > there:
        parts = [f"{show_bytes(gpus * plan.save_copy_bytes)} for background saves"] if plan.save_copy_bytes else []
        parts += [f"{show_bytes(gpus * plan.memory.host)} of offloaded states"] if plan.memory.host else []
        yield (
            f"host memory: {gpus} ranks of a node need {show_bytes(needed)} ({', '.join(parts)}), {source} {show_bytes(there)}:"
            " set save_in_background=false, take more nodes, or ask for more memory"
        )


def _disk(config: TrainConfig, plan: RunPlan) -> Iterator[str]:
    folder = config.run_dir.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    kept = config.keep_last + 2 + (config.max_steps // config.keep_every_steps if config.keep_every_steps else 0)
    needed, free = kept * plan.checkpoint_bytes + plan.export_bytes, shutil.disk_usage(existing).free
    if needed > free:
        for_good = ", keep_every_steps" if config.keep_every_steps else ""
        yield (
            f"run_dir={config.run_dir}: {kept} checkpoints of {show_bytes(plan.checkpoint_bytes)}"
            f" (keep_last={config.keep_last}, the best, one being written{for_good})"
            + (f" and {show_bytes(plan.export_bytes)} of exports" if plan.export_bytes else "")
            + f" need {show_bytes(needed)},"
            f" {show_bytes(free)} are free: keep fewer, or use another disk"
        )


def _sbatch(config: PlanConfig, cluster: Cluster) -> Iterator[str]:
    options = sbatch_options(config.sbatch)
    if config.script is not None:
        yield from _script(config.script)
        if config.script.is_file():
            lines = re.findall(r"^#SBATCH (.*)$", config.script.read_text(encoding="utf-8"), flags=re.MULTILINE)
            options = {**sbatch_options(" ".join(lines)), **options}
    asked = gpus_asked(options)
    if asked is not None and asked[0] * asked[1] != cluster.gpus:
        yield (
            f"sbatch: {asked[0]} nodes with {asked[1]} GPUs each are {asked[0] * asked[1]} GPUs, the run is planned for"
            f" {cluster.gpus}: make them equal"
        )
    limit, signal = options.get("time"), options.get("signal", "")
    seconds = slurm_seconds(limit) if limit else None
    if limit and seconds is None:
        yield f"sbatch: --time={limit} is not in a time format of SLURM: give minutes, hours:minutes:seconds or days-hours"
    warning = int(signal.rpartition("@")[2]) if signal.rpartition("@")[2].isdigit() else 0
    if (config.sbatch or config.script) and seconds and warning < SIGNAL_SECONDS:
        yield (
            f"sbatch: --signal={signal or 'not given'} warns {warning} s before the time limit: give B:USR1@300, so that the"
            " run saves a checkpoint and goes back to the queue"
        )
    elif seconds and warning >= seconds:
        yield f"sbatch: --time={limit} is not more than the {warning} s of --signal: the job gets the stop signal as it starts"


def _script(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"script={path}: no such file"
        return
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    if done.returncode:
        yield f"script={path}: not valid for bash: {done.stderr.strip().splitlines()[0]}"
    if not re.search(r"^#SBATCH --requeue", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        yield f"script={path}: has no `#SBATCH --requeue`: after a node failure the job does not start again"
