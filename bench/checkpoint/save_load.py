"""How long saving holds up training, and how fast checkpoints are written and read, beside torch's and DeepSpeed's own.

    python -m bench.checkpoint.save_load [--sizes 10m,100m] [--repetitions 3] [--folder FOLDER]   (about 8 minutes on two cores)
    python -m bench.checkpoint.save_load --sizes 10m --repetitions 1                                (a short form)

Two ranks hold fp32 weights and Adam's two moments (12 bytes a parameter) of a model of 10, 100 or 350 million parameters,
sharded by FSDP2, and by ZeRO 1. Each method saves the same state into an empty folder, in turn, after a sync:

- `megagpt`, `megagpt_background`: ours, in step with training and in the background: sha256, fsync, manifest, rename.
- `dcp`, `dcp_async`: torch.distributed.checkpoint's save (sync_files=True, its default) and async_save (its own gloo group).
- `torch_save`: every rank torch.saves its own tensors to a file of its own; `torch_save_fsync` also syncs it.
- `deepspeed`: DeepSpeed's save_checkpoint of the ZeRO 1 engine; it syncs nothing.
- `disk_limit`: the same number of bytes written by both ranks from one buffer, and fsync: what the disk takes at that moment.

`blocked_s` is until training may go on, `total_s` until the checkpoint is complete; loads read with an empty page cache
(posix_fadvise) and put everything back into the engine. Ours verifies every byte before it uses any; the others verify none.
Medians; GB = 1e9 bytes of state. Ratios hold between methods of one row, which ran in turn on the same disk.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.ranks import run_ranks
from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint.ownership import take_ownership
from megagpt.data.state import TrainState
from megagpt.distributed.world import World
from megagpt.engine.build import build_engine
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from megagpt.engine.optim import OptimConfig
from megagpt.measurement import spread, write_results
from megagpt.model.gpt import ModelConfig

SIZE = 2
MODELS = {
    "10m": ModelConfig(vocab_size=16384, seq_len=64, num_layers=8, num_heads=4, hidden_size=256),
    "100m": ModelConfig(vocab_size=32000, seq_len=64, num_layers=12, num_heads=12, hidden_size=768),
    "350m": ModelConfig(vocab_size=32000, seq_len=64, num_layers=24, num_heads=16, hidden_size=1024),
}
ENGINES: dict[str, EngineConfig] = {"fsdp": FSDPConfig(), "zero1": DeepSpeedConfig(zero_stage=1)}


@dataclass(frozen=True, slots=True)
class Method:
    """save(folder) -> wait() for the rest; load(folder) puts everything back."""

    save: Callable[[Path], Callable[[], Any]]
    load: Callable[[Path], Any] | None


def measure(world: World, root: Path, model: ModelConfig, engine_name: str, repetitions: int) -> dict[str, Any]:
    """Every method in turn on this rank; times by method, on rank 0."""
    engine: Any = build_engine(model, OptimConfig(), ENGINES[engine_name], world, precision="fp32", micro_batch_size=1)
    mine = 0
    for partition in engine.state().values():
        partition.data.uniform_(-1, 1)
        mine += 4 * len(partition.data)
    engine.refresh(1)
    state_bytes = world.sum([mine])[0]
    methods = ours(world, engine, root) | {"disk_limit": disk_limit(world, mine)}
    methods |= fsdp_peers(world, engine) if engine_name == "fsdp" else {"deepspeed": deepspeed_peer(engine)}
    times: dict[str, dict[str, list[float]]] = {name: {"blocked_s": [], "total_s": [], "load_s": []} for name in methods}
    for repetition in range(repetitions):
        for name in methods if repetition % 2 == 0 else reversed(methods):
            folder = root / name
            for key, seconds in once(world, methods[name], folder).items():
                times[name][key].append(seconds)
            if world.rank == 0:
                shown = {key: round(values[-1], 2) for key, values in times[name].items() if values}
                print(f"{engine_name} {name:20} {shown}", flush=True)
                empty(folder)
            world.barrier()
    return {"state_bytes": state_bytes, "times": times}


def once(world: World, method: Method, folder: Path) -> dict[str, float]:
    """One save, and one load with an empty page cache: seconds, of the slowest rank."""
    if world.rank == 0:
        folder.mkdir(exist_ok=True)
        os.sync()
    world.barrier()
    began = time.perf_counter()
    wait = method.save(folder)
    blocked = time.perf_counter() - began
    wait()
    world.barrier()
    seconds = {"blocked_s": blocked, "total_s": time.perf_counter() - began}
    if method.load is not None:
        world.barrier()
        if world.rank == 0:
            forget(folder)
        world.barrier()
        began = time.perf_counter()
        method.load(folder)
        world.barrier()
        seconds["load_s"] = time.perf_counter() - began
    return {key: max(world.gather(value)) for key, value in seconds.items()}


def empty(folder: Path) -> None:
    """Remove what was saved."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "owner.json":
            path.unlink()


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def nothing() -> None:
    """All was done in `save`."""


def ours(world: World, engine: Any, root: Path) -> dict[str, Method]:
    """Both ways of saving; one Saver for all repetitions, as in a run."""

    def method(name: str, background: bool) -> Method:
        saver = checkpoint.Saver(root / name, world, take_ownership(root / name, world), background=background)

        def save(folder: Path) -> Callable[[], Any]:
            saver.save(engine, TrainState(step=1), {})
            return saver.wait

        return Method(save, lambda folder: checkpoint.restore(folder, engine, world))

    return {"megagpt": method("megagpt", False), "megagpt_background": method("megagpt_background", True)}


def disk_limit(world: World, size: int) -> Method:
    """The bytes of this rank from one buffer."""

    def save(folder: Path) -> Callable[[], Any]:
        buffer = memoryview(os.urandom(8 << 20))
        with (folder / str(world.rank)).open("wb", buffering=0) as file:
            for start in range(0, size, len(buffer)):
                file.write(buffer[: min(len(buffer), size - start)])
            os.fsync(file.fileno())
        return nothing

    def load(folder: Path) -> None:
        buffer = bytearray(8 << 20)
        with (folder / str(world.rank)).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return Method(save, load)


def fsdp_peers(world: World, engine: Any) -> dict[str, Method]:
    """torch's ways for a sharded model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    group = dist.new_group(backend="gloo")

    def state() -> dict[str, Any]:
        model, optim = get_state_dict(engine.module, engine._optimizer)
        return {"model": model, "optim": optim}

    def load(folder: Path) -> None:
        found = state()
        dcp.load(found, checkpoint_id=folder)
        set_state_dict(engine.module, engine._optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])

    def save(folder: Path) -> Callable[[], Any]:
        dcp.save(state(), checkpoint_id=folder)
        return nothing

    def save_async(folder: Path) -> Callable[[], Any]:
        future: Any = dcp.async_save(state(), checkpoint_id=folder, process_group=group)
        return future.result

    def torch_save(sync: bool) -> Method:
        def save(folder: Path) -> Callable[[], Any]:
            partitions = {key: partition.data for key, partition in engine.state().items()}
            with (folder / str(world.rank)).open("wb") as file:
                torch.save(partitions, file)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            return nothing

        def load(folder: Path) -> None:
            found = torch.load(folder / str(world.rank), weights_only=True)
            for key, partition in engine.state().items():
                partition.data.copy_(found[key])

        return Method(save, load)

    return {
        "dcp": Method(save, load),
        "dcp_async": Method(save_async, None),
        "torch_save": torch_save(False),
        "torch_save_fsync": torch_save(True),
    }


def deepspeed_peer(engine: Any) -> Method:
    """DeepSpeed's own files."""

    def save(folder: Path) -> Callable[[], Any]:
        engine.model.save_checkpoint(str(folder), tag="it")
        return nothing

    return Method(save, lambda folder: engine.model.load_checkpoint(str(folder), tag="it"))


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10m,100m")
    parser.add_argument("--engines", default="fsdp,zero1")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name", default="checkpoints")
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in arguments.sizes.split(","):
        for engine in arguments.engines.split(","):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                folder = Path(name)
                (folder / "saves").mkdir()
                words = (folder / "saves", MODELS[size], engine, arguments.repetitions)
                found = run_ranks(measure, SIZE, *words)[0]
            rows += rows_of(size, engine, found)
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    results = {"about": about, "ranks": SIZE, "rows": rows, "lost": lost(rows)}
    write_results(arguments.name, results, packages=("torch", "deepspeed", "safetensors"))


WHY = (
    "torch_save and deepspeed sync nothing, so that a crash of the machine may take what they call saved, and no peer can tell "
    "a flipped bit: ours makes a sha256 of every byte while it writes, and verifies it before a byte is used, which is most of "
    "a load. ZeRO 1 then gathers the weights from the ranks that hold them, over gloo here, where DeepSpeed's own checkpoint "
    "holds them whole once more. What training waits for is megagpt_background's copy."
)


def lost(rows: list[dict[str, Any]]) -> str:
    """A sentence per model and engine in which a peer saves, holds up training, or loads for a shorter time."""
    sentences = []
    for model, engine in dict.fromkeys((row["model"], row["engine"]) for row in rows):
        cell = {row["method"]: row for row in rows if (row["model"], row["engine"]) == (model, engine)}
        peers = [name for name in cell if name != "disk_limit" and not name.startswith("megagpt")]
        for mine, key, does in (
            ("megagpt", "total_s", "saves for"),
            ("megagpt_background", "blocked_s", "holds up training for"),
            ("megagpt", "load_s", "loads for"),
        ):
            times = {name: cell[name][key]["median"] for name in (mine, *peers) if key in cell[name]}
            better = [f"{times[mine] / times[name]:.2f} of {name}'s time" for name in times if times[name] < times[mine]]
            if better:
                sentences.append(f"{model}, {engine}: {mine} {does} {', '.join(better)}.")
    return " ".join([*sentences, WHY]) if sentences else ""


def rows_of(size: str, engine: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per method: times, rates, and ratios to the disk's limit and to our own save in step."""
    rows, gigabytes = [], found["state_bytes"] / 1e9
    medians = {name: {key: spread(values) for key, values in times.items() if values} for name, times in found["times"].items()}
    for name, times in medians.items():
        row: dict[str, Any] = {"model": size, "engine": engine, "method": name, "state_gb": round(gigabytes, 3), **times}
        row["save_gb_per_s"] = gigabytes / times["total_s"]["median"]
        row["save_share_of_disk_limit"] = medians["disk_limit"]["total_s"]["median"] / times["total_s"]["median"]
        row["blocked_over_megagpt_in_step"] = times["blocked_s"]["median"] / medians["megagpt"]["blocked_s"]["median"]
        if "load_s" in times:
            row["load_gb_per_s"] = gigabytes / times["load_s"]["median"]
            row["load_share_of_disk_limit"] = medians["disk_limit"]["load_s"]["median"] / times["load_s"]["median"]
        rows.append(row)
        print({key: value["median"] if isinstance(value, dict) else value for key, value in row.items()}, flush=True)
    return rows


if __name__ == "__main__":
    main()
