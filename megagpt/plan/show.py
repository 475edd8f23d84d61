"""Print a plan in full, in six lines, or as a table over numbers of GPUs; `run` is what the tool calls."""

from pathlib import Path

from megagpt.command import EXIT_DONE, EXIT_USER_ERROR
from megagpt.config import UserError, dump
from megagpt.files import write_text
from megagpt.plan.preflight import preflight_job, source_epochs
from megagpt.plan.run_plan import GIB, Cluster, PlanConfig, RunPlan, cluster_of, make_plan, save_interval_seconds
from megagpt.plan.suggest import Suggestion, suggest
from megagpt.train.config import TrainConfig


def run(config: PlanConfig) -> int:
    """Make and print the plan, then do what else the settings ask for (sweep, fit, preflight).

    Returns the exit status: 2 if the preflight finds a problem or no settings fit. Raises UserError if groups do not divide
    the ranks (without a preflight, which reports it).
    """
    cluster, train = cluster_of(config), config.train_config()
    plan: RunPlan | UserError
    found: Suggestion | None = None
    try:
        plan = make_plan(train, cluster)
    except UserError as error:
        if not config.preflight:
            raise
        plan = error
    problems = preflight_job(config, cluster, plan) if config.preflight else []
    if isinstance(plan, RunPlan):
        found = suggest(train, cluster, plan) if config.fit or not config.summary else None
        print("\n".join(summary_lines(config, cluster, plan) if config.summary else plan_lines(config, cluster, plan, found)))
        if config.sweep:
            print("\n".join(sweep_lines(config)))
        if config.fit:
            print(write_fitting(config, train, plan, found))
    for problem in problems:
        print(f"preflight: {problem}")
    if config.preflight and not problems:
        print("preflight: no problem was found")
    failed = bool(problems) or (config.fit and isinstance(plan, RunPlan) and not plan.fits and found is None)
    return EXIT_USER_ERROR if failed else EXIT_DONE


def summary_lines(config: PlanConfig, cluster: Cluster, plan: RunPlan) -> list[str]:
    """Six lines: GPUs, batch, memory, speed, time, checkpoints."""
    return [
        f"plan: {plan.parameters / 1e9:.2f} B parameters on {cluster.gpus} x {cluster.name}",
        f"batch: {config.global_batch_size} samples = {_count(config.global_batch_size * config.data.seq_len)} tokens,"
        f" micro-batch {config.micro_batch_size}, accumulation {plan.accumulation}",
        _memory_line(plan),
        _speed_line(cluster, plan),
        _time_line(config, cluster, plan),
        _checkpoint_line(config, cluster, plan),
    ]


def plan_lines(config: PlanConfig, cluster: Cluster, plan: RunPlan, found: Suggestion | None) -> list[str]:
    """The whole plan."""
    lines = summary_lines(config, cluster, plan)
    flops = plan.flops
    lines.append(
        f"FLOPs per token: {flops.full / 1e9:.2f} G full, {flops.causal / 1e9:.2f} causal, {flops.hardware / 1e9:.2f} hardware"
    )
    lines.append("memory of a GPU at its highest, GiB:")
    lines += [f"  {size / GIB:8.2f}  {name}" for name, size in sorted(plan.memory.parts.items(), key=lambda item: -item[1])]
    if plan.memory.host:
        lines.append(f"  {plan.memory.host / GIB:8.2f}  in host memory, per GPU")
    if plan.save_copy_bytes:
        lines.append(f"  {plan.save_copy_bytes / GIB:8.2f}  in host memory for background saves, per GPU")
    lines.append("traffic of a step, GiB of buffers:")
    for item in plan.traffic:
        where = "inside a node" if item.ranks <= cluster.gpus_per_node and item.group != "far" else "between nodes"
        lines.append(f"  {item.bytes / GIB:8.2f}  {item.collective} of {item.purpose} over {item.ranks} ranks, {where}")
    if plan.step is not None:
        step = plan.step
        parts = ("products", "attention", "elementwise", "communication", "update")
        lines.append(f"step: {step.total:.3f} s: " + ", ".join(f"{name} {getattr(step, name):.3f}" for name in parts))
    for name, epochs in source_epochs(config).items():
        lines.append(f"data: {name} is read {epochs:.2f} times")
    lines += [f"note: {note}" for note in plan.notes]
    if found is not None:
        lines.append(f"suggestion: {' '.join(f'{k}={_word(v)}' for k, v in found.changes.items())} ({found.why})")
    elif plan.fits is False:
        lines.append("suggestion: no micro-batch, checkpointing or sharding of this engine fits: more GPUs, or offloading")
    return lines


def sweep_lines(config: PlanConfig) -> list[str]:
    """A row per number of GPUs; also draws config.plot."""
    rows: list[tuple[str, ...]] = [("GPUs", "GiB", "fits", "tokens/s", "MFU %", "days", "GPU-hours")]
    points: list[tuple[int, float]] = []
    for gpus in config.sweep:
        cluster = cluster_of(config, gpus)
        try:
            plan = make_plan(config.train_config(), cluster)
        except UserError as error:
            rows.append((str(gpus), str(error), "", "", "", "", ""))
            continue
        rate, days = plan.tokens_per_second, (plan.seconds or 0) / 86400
        fits = {True: "yes", False: "no", None: "?"}[plan.fits]
        times = ("-", "-", "-", "-") if rate is None else (
            _count(rate), f"{100 * (plan.mfu or 0):.1f}", f"{days:.2f}", f"{days * 24 * gpus:,.0f}",
        )  # fmt: skip
        rows.append((str(gpus), f"{plan.needed_gib:.1f}", fits, *times))
        if rate is not None:
            points.append((gpus, rate))
    if config.plot is not None:
        _draw(points, config.plot)
    widths = [max(len(row[column]) for row in rows if len(row[column]) < 40) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_fitting(config: PlanConfig, train: TrainConfig, plan: RunPlan, found: Suggestion | None) -> str:
    """Write the configuration that fits, or the run's own if that is best; returns a sentence on what was done.

    Raises UserError if the GPU's memory is not known.
    """
    if plan.capacity_gib is None:
        raise UserError(f"fit=true: the memory of gpu={config.gpu} is not known: give gpu_memory_gib")
    if found is None and not plan.fits:
        return f"fit: no settings that were tried fit {plan.capacity_gib:.1f} GiB; {config.output} was not written"
    write_text(config.output, dump(train if found is None else found.config))
    return f"fit: {config.output} written" + ("" if found is not None else ", unchanged: the run fits as it is")


def _memory_line(plan: RunPlan) -> str:
    if plan.capacity_gib is None:
        return f"memory: {plan.needed_gib:.1f} GiB per GPU at its highest, in the phase {plan.memory.phase}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    needed = f"{plan.needed_gib:.1f} of {plan.capacity_gib:.1f} GiB per GPU"
    return f"memory: {needed}, {verdict} (highest in the phase {plan.memory.phase})"


def _speed_line(cluster: Cluster, plan: RunPlan) -> str:
    if plan.tokens_per_second is None or plan.step is None or plan.error is None:
        return f"speed: not known for gpu={cluster.name}"
    rate, error = plan.tokens_per_second, plan.error
    return (
        f"speed: {_count(rate)} tokens/s ({_count(rate * (1 - error))} to {_count(rate * (1 + error))}),"
        f" {rate / cluster.gpus:,.0f} per GPU, MFU {100 * (plan.mfu or 0):.1f} %, step {plan.step.total:.2f} s"
    )


def _time_line(config: PlanConfig, cluster: Cluster, plan: RunPlan) -> str:
    if plan.seconds is None or plan.error is None:
        return f"time: not known; {_count(plan.tokens)} tokens in {config.max_steps} steps"
    days, error = plan.seconds / 86400, plan.error
    hours = days * 24 * cluster.gpus
    cost = "" if config.price_per_gpu_hour is None else f", cost {hours * config.price_per_gpu_hour:,.0f}"
    return (
        f"time: {days:.2f} days ({days / (1 + error):.2f} to {days / (1 - error):.2f}) for {_count(plan.tokens)} tokens,"
        f" {hours:,.0f} GPU-hours{cost}"
    )


def _checkpoint_line(config: PlanConfig, cluster: Cluster, plan: RunPlan) -> str:
    line = f"checkpoints: {plan.checkpoint_bytes / 1e9:.2f} GB each, every {config.save_every_steps} steps"
    if plan.step is not None:
        line += f" = {config.save_every_steps * plan.step.total / 60:.0f} min"
    if config.storage_gb_per_second is not None:
        write, interval = save_interval_seconds(plan, cluster.gpus, config.storage_gb_per_second)
        line += f", {write:.0f} s to write; one every {interval / 60:.0f} min loses the least time"
    if config.export_every_steps:
        line += f"; exports every {config.export_every_steps} steps, {plan.export_bytes / 1e9:.2f} GB together"
    return line


def _draw(points: list[tuple[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    gpus = [point[0] for point in points]
    axes.plot(gpus, [point[1] for point in points], marker="o", label="planned")
    if points:
        axes.plot(gpus, [points[0][1] / points[0][0] * count for count in gpus], linestyle="--", label="ideal")
    axes.set(xlabel="GPUs", ylabel="tokens per second", xscale="log", yscale="log", xticks=gpus, xticklabels=map(str, gpus))
    axes.minorticks_off()
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _count(value: float) -> str:
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:.0f}"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
