"""A rank that runs out of memory: a record of the memory in use, and an error that names settings that need less.

On a GPU the largest allocations are those of the CUDA allocator (torch.cuda.memory._snapshot), named by the tensors that lie in
them; on a CPU they are the engine's own tensors, with the activations as megagpt.plan expects them.
"""

import logging
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagpt.config import Failure, UserError
from megagpt.distributed.world import World, utc_now
from megagpt.engine.base import Engine
from megagpt.engine.build import refuse_shared_samples, refuse_unsupported
from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.files import show_bytes, write_json
from megagpt.train.config import TrainConfig

log = logging.getLogger(__name__)

NUM_LARGEST = 5
NUM_SETTINGS = 3
MUCH_UNUSED = 0.1
"""Share of the device's memory that torch's blocks waste from which on it is worth a line."""


class OutOfMemory(Failure):
    """This rank alone has found no memory: the others are still at work."""


class Planner(Protocol):
    """Bytes by part at the most of a step, on one of `ranks` GPUs ("gpu") or processes ("cpu"): run_plan.planned_parts."""

    def __call__(self, config: TrainConfig, ranks: int, kernels: str) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Allocation:
    """`count` allocations of `size` bytes each, and what lies in them."""

    size: int
    count: int
    what: str

    @property
    def total(self) -> int:
        return self.size * self.count


@dataclass(frozen=True, slots=True)
class Held:
    """The memory of one of the engine's tensors; several may share it. `kind`: weights, gradients or optimizer states."""

    address: int
    size: int
    kind: str
    names: tuple[str, ...]
    device: str

    @property
    def what(self) -> str:
        """In words, with one name at most."""
        return f"{self.kind} of {self.names[0]}" + (f" and {len(self.names) - 1} more" if len(self.names) > 1 else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory did not suffice. torch's CPU allocator says so in a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


@contextmanager
def explaining_out_of_memory(
    config: TrainConfig,
    engine: Engine | None,
    world: World,
    step: int,
    clock: Callable[[str], AbstractContextManager[None]],
    planner: Planner | None = None,
    *,
    attempt: int,
    when: str = "",
) -> Iterator[None]:
    """Put the update after `step` of them into it, or what `when` says ("in the evaluation after step 8"). If memory runs out
    there, write run_dir/memory/attempt_A_rank_N_step_S.json (with CUDA a .pickle beside it) and raise OutOfMemory with it in
    words. If that fails, it is logged and the first error raised. engine: None while there is none.

    clock: the run's stopwatch; the record is charged to "save", so that the watchdog allows for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        try:
            with clock("save"):
                words = _record(config, engine, world, step, error, planner, attempt, when or f"in step {step + 1}")
        except Exception:
            log.exception("rank %d: the record of what was held when memory ran out could not be made", world.rank)
            raise error from None
        raise OutOfMemory(words) from error


def _record(
    config: TrainConfig,
    engine: Engine | None,
    world: World,
    step: int,
    error: BaseException,
    planner: Planner | None,
    attempt: int,
    when: str,
) -> str:
    """Write the record; returns the message."""
    path = config.run_dir / "memory" / f"attempt_{attempt:04d}_rank_{world.rank}_step_{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cuda, snapshot = world.device.type == "cuda", None
    if cuda:  # before anything is freed
        snapshot = torch.cuda.memory._snapshot(world.device)
        free, total = torch.cuda.mem_get_info(world.device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    held = [] if engine is None else held_tensors(engine)
    parts = {kind: sum(item.size for item in held if item.kind == kind) for kind in dict.fromkeys(item.kind for item in held)}
    largest = allocations(snapshot["segments"], held) if snapshot else _counted((item.size, item.what) for item in held)
    largest = sorted(largest, key=lambda item: item.total, reverse=True)[:NUM_LARGEST]
    unused = sum(s["total_size"] - s["active_size"] for s in snapshot["segments"]) if snapshot else 0
    if snapshot:
        with path.with_suffix(".pickle").open("wb") as file:
            pickle.dump(snapshot, file)
    traceback.clear_frames(error.__traceback__)  # the step's activations: what follows needs memory too
    plan = None if planner is None else partial(planner, ranks=world.size, kernels="gpu" if cuda else "cpu")
    record = {
        "time": utc_now(),
        "incarnation": attempt,
        "rank": world.rank,
        "step": step,
        "when": when,
        "device": str(world.device),
        "error": str(error),
        "free_bytes": free,
        "total_bytes": total,
        "unused_bytes_of_allocator": unused,
        "engine": parts,
        "largest": [{"bytes": item.size, "count": item.count, "what": item.what} for item in largest],
        "planned": None if plan is None else dict(plan(config)),
        "try": [asdict(change) for change in settings_to_try(config, world.size, on_gpu=cuda, plan=plan)],
        "snapshot": path.with_suffix(".pickle").name if snapshot else None,
    }
    write_json(path, record)
    return in_words(record, path)


def held_tensors(engine: Engine) -> list[Held]:
    """The memory of the engine's weights, gradients and optimizer states on this rank, each once."""
    found: dict[int, tuple[int, str, list[str], str]] = {}

    def add(tensor: Tensor, kind: str, name: str) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage.nbytes():
            names = found.setdefault(storage.data_ptr(), (storage.nbytes(), kind, [], str(local.device)))[2]
            if name not in names:
                names.append(name)

    for name, parameter in engine.module.named_parameters():
        add(parameter.data, "weights", name)
        if parameter.grad is not None:
            add(parameter.grad, "gradients", name)
    for key, partition in engine.state().items():
        kind, _, name = key.partition(".")
        add(partition.data, "master weights" if kind == "param" else "optimizer states", name)
    return [Held(address, size, kind, tuple(names), on) for address, (size, kind, names, on) in found.items()]


def allocations(segments: Sequence[Mapping[str, Any]], held: Sequence[Held]) -> list[Allocation]:
    """The live blocks of an allocator's snapshot; blocks of equal size and contents are one allocation with a count.

    What holds none of the engine's tensors is named by where it was made, if the snapshot says that.
    """
    found: list[tuple[int, str]] = []
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            begin = block.get("address", address)
            address = begin + block["size"]
            if block["state"] != "active_allocated":
                continue
            inside = [item for item in held if item.device != "cpu" and begin <= item.address < address]
            found.append((block["size"], _contents(inside) if inside else _made_at(block.get("frames") or ())))
    return _counted(found)


def _counted(found: Iterable[tuple[int, str]]) -> list[Allocation]:
    return [Allocation(size, count, what) for (size, what), count in Counter(found).items()]


def _contents(inside: Sequence[Held]) -> str:
    first = inside[0]
    return Held(first.address, 0, first.kind, tuple(name for item in inside for name in item.names), first.device).what


def _made_at(frames: Sequence[Mapping[str, Any]]) -> str:
    what = "activations or buffers"
    ours = next((frame for frame in frames if "megagpt" in Path(frame["filename"]).parts), None)
    return what if ours is None else f"{what} made by {ours['name']} ({Path(ours['filename']).name}:{ours['line']})"


@dataclass(frozen=True, slots=True)
class Change:
    """Other settings (by dotted name) that need less memory, why, and the bytes that a step with them is planned to hold."""

    changes: dict[str, Any]
    why: str
    planned_bytes: int | None = None


def settings_to_try(
    config: TrainConfig, ranks: int, *, on_gpu: bool, plan: Callable[[TrainConfig], Mapping[str, int]] | None = None
) -> list[Change]:
    """Up to three changes that this run accepts; with `plan` (bytes by part) only those that are planned to need less."""
    found: list[Change] = []
    before = None if plan is None else sum(plan(config).values())
    for changes, why in _candidates(config, ranks, on_gpu=on_gpu):
        if len(found) == NUM_SETTINGS:
            break
        if not _accepted(config, changes):
            continue
        planned = None
        if plan is not None and before is not None and "save_in_background" not in changes:  # which no plan counts
            planned = sum(plan(changed(config, changes)).values())
            if planned >= before:
                continue
        found.append(Change(changes, why, planned))
    return found


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings with some of them changed. Raises pydantic's ValidationError if they do not fit together."""
    values = config.model_dump()
    for name, value in changes.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return TrainConfig.model_validate(values)


def _accepted(config: TrainConfig, changes: Mapping[str, Any]) -> bool:
    try:
        after = changed(config, changes)
        canonical = after.determinism == "canonical"
        refuse_unsupported(after.engine, after.optim, after.precision, canonical=canonical)
        refuse_shared_samples(after.engine, after.model, seq_len=after.data.seq_len, canonical=canonical)
    except (UserError, ValidationError):
        return False
    return True


def _candidates(config: TrainConfig, ranks: int, *, on_gpu: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """The three kinds of change first, then further ones of the same kinds."""
    engine, batch = config.engine, config.micro_batch_size
    if batch > 1:
        changes: dict[str, Any] = {"micro_batch_size": batch // 2}
        if config.determinism == "canonical":
            changes["allow_change"] = [*config.allow_change, "micro_batch_size"]
        yield changes, f"halves activations; the global batch of {config.global_batch_size} stays"
    modes = _checkpointing(config)
    later = [({"activation_checkpointing": mode}, why) for mode, why in modes]
    shards = _sharding(config, ranks) + (_offloading(config) if on_gpu else [])
    if later:
        # Selective checkpointing is no way out with ZeRO 3: the next one is taken.
        first = next((item for item in later if _accepted(config, item[0])), None)
        if first is not None:
            yield first
            later.remove(first)
    first_shards = next((item for item in shards if _accepted(config, item[0])), None)
    if first_shards is not None:
        yield first_shards
        shards.remove(first_shards)
    if not on_gpu and config.save_in_background:
        yield {"save_in_background": False}, "host memory for a copy of the state is not needed"
    yield from shards
    yield from later
    size = 2 * engine.context_parallel_size
    if ranks % size == 0 and config.global_batch_size // batch >= ranks // size:
        yield {"engine.context_parallel_size": size}, f"{size} ranks share each sample's activations"


def _checkpointing(config: TrainConfig) -> list[tuple[str, str]]:
    full = ("full", "keeps only what each block begins with; a third more work")
    selective = ("selective", "recomputes all but matrix products and attention; little more work")
    mode = config.activation_checkpointing
    if mode == "none":
        return [selective, full]
    return [] if mode in ("full", 1) else [full]


def _sharding(config: TrainConfig, ranks: int) -> list[tuple[dict[str, Any], str]]:
    engine = config.engine
    if ranks == 1:
        return []
    if isinstance(engine, FSDPConfig):
        whole = engine.shard_size is not None and engine.shard_size < ranks
        found: list[tuple[dict[str, Any], str]] = []
        if not engine.reshard_after_forward:
            found.append(({"engine.reshard_after_forward": True}, "frees a block's gathered weights after its forward pass"))
        if engine.accumulate == "whole" and config.global_batch_size > config.micro_batch_size * ranks:
            found.append(({"engine.accumulate": "sharded"}, "keeps no whole gradients between micro-batches; more traffic"))
        if whole:
            found.append(({"engine.shard_size": None}, f"shards over all {ranks} ranks instead of {engine.shard_size}"))
        return found
    parts = {1: "optimizer states", 2: "gradients", 3: "weights"}
    stages = range(engine.zero_stage + 1, 4)
    return [({"engine.zero_stage": s}, f"shards {parts[s]} too, over {ranks} ranks; more traffic") for s in stages]


def _offloading(config: TrainConfig) -> list[tuple[dict[str, Any], str]]:
    engine = config.engine
    if isinstance(engine, FSDPConfig):
        words = "keeps weights, gradients and optimizer states in host memory; slower"
        return [] if engine.cpu_offload else [({"engine.cpu_offload": True}, words)]
    assert isinstance(engine, DeepSpeedConfig)
    if not engine.offload_optimizer:
        return [({"engine.offload_optimizer": True}, "keeps fp32 weights and optimizer states in host memory; slower")]
    if engine.offload_parameters:
        return []
    return [({"engine.offload_parameters": True}, "keeps the working weights in host memory; slower")]


def in_words(record: Mapping[str, Any], path: Path) -> str:
    """The record as the message of an error: lines that begin with what happened."""
    held = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in record["engine"].items())
    lines = [
        f"rank {record['rank']} ran out of memory {record['when']} on {record['device']}: "
        + record["error"].strip().splitlines()[0],
        f"  free: {show_bytes(record['free_bytes'])} of {show_bytes(record['total_bytes'])}"
        + (f", and {show_bytes(record['unused_bytes_of_allocator'])} unused in torch's blocks" if record["snapshot"] else ""),
        f"  the engine's tensors: {held or 'none yet'}",
        "  largest allocations: "
        + "; ".join(
            (f"{item['count']} x " if item["count"] > 1 else "") + f"{show_bytes(item['bytes'])} {item['what']}"
            for item in record["largest"]
        ),
    ]
    if record["planned"] is not None:
        planned = sorted(record["planned"].items(), key=lambda item: -item[1])
        words = ", ".join(f"{part} {show_bytes(size)}" for part, size in planned)
        lines.append(f"  planned at the most of a step: {show_bytes(sum(record['planned'].values()))} ({words})")
    lines.append(
        "  settings to try, one or several:" if record["try"] else "  no setting of this run needs less: more ranks do"
    )
    for item in record["try"]:
        words = " ".join(f"{name}={_shown(value)}" for name, value in item["changes"].items())
        peak = "" if item["planned_bytes"] is None else f" (planned: {show_bytes(item['planned_bytes'])})"
        lines.append(f"    {words}: {item['why']}{peak}")
    if record["unused_bytes_of_allocator"] > MUCH_UNUSED * record["total_bytes"]:
        lines.append(
            "    PYTORCH_ALLOC_CONF=expandable_segments:True (environment): what is free in torch's blocks is in small pieces"
        )
    lines.append("  The same command with another setting resumes from the newest checkpoint; without one it begins anew.")
    snapshot = f", {record['snapshot']} (open it at pytorch.org/memory_viz)" if record["snapshot"] else ""
    lines.append(f"  record: {path}{snapshot}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value as one writes it on a command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
