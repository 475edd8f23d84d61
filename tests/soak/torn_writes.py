"""Kill -9 at random moments of saving, damaged files, full disks: is there always a good checkpoint, is a bad one ever loaded?

    python tests/soak/torn_writes.py [--kills 24]         (24 kills in each of four modes; about 5 minutes on two cores)
    python tests/soak/torn_writes.py --kills 3 --damages 2  (a short form)

Kills: two ranks of FSDP2 save one checkpoint after the other, each filled with numbers that follow from its version. From
outside all ranks are killed: at any moment, or as soon as a file of some phase is seen in the directory. What was being done is
told afterwards from what lies on the disk. Then the ranks start again as a training run does, load the newest good checkpoint,
compare every element with what its version must hold, and go on saving. Modes: `synchronous`; `background`; `retention`: each
save is followed by the deletion of the one before; `replacement`: every step is saved twice. The code that saves knows nothing
of this.

SIGKILL ends processes, not the kernel: that data reached the disk before the rename (fsync) is not shown by this.

Damage: in the newest of two checkpoints one bit is flipped, a file cut at a random length, or a file removed, for every kind of
file. Full disk: a tmpfs that a filler leaves a random room on, from nothing to a whole checkpoint.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from ranks import free_port  # noqa: E402

from megagpt.checkpoint import save_load as checkpoint  # noqa: E402
from megagpt.checkpoint.on_disk import list_checkpoints  # noqa: E402
from megagpt.checkpoint.ownership import take_ownership  # noqa: E402
from megagpt.checkpoint.partitions import CheckpointError, read_partitions  # noqa: E402
from megagpt.config import UserError  # noqa: E402
from megagpt.data.state import TrainState  # noqa: E402
from megagpt.distributed.world import World, close_world, init_world, lone_world  # noqa: E402
from megagpt.engine.base import Engine, Partition  # noqa: E402
from megagpt.engine.build import build_engine, whole_shapes  # noqa: E402
from megagpt.engine.config import FSDPConfig  # noqa: E402
from megagpt.engine.optim import OptimConfig  # noqa: E402
from megagpt.files import read_json  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402
from megagpt.model.gpt import ModelConfig  # noqa: E402

SIZE = 2
MODEL = ModelConfig(vocab_size=256, seq_len=32, num_layers=2, num_heads=4, hidden_size=256)
MODES = ("synchronous", "background", "retention", "replacement")
PHASES = (
    "temporary write",
    "between write and manifest",
    "between manifest and rename",
    "between the renames of a replacement",
    "removing what was replaced",
    "during retention",
    "after the rename",
)
"""What the disk shows after a kill, in the order in which a save goes through them."""


def expected(key: str, version: int, start: int, length: int) -> torch.Tensor:
    """Elements [start, start + length) of a tensor in a version, fp32: whole numbers below 2^24, so exact."""
    return ((torch.arange(start, start + length) * 7 + version * 131 + zlib.crc32(key.encode()) % 997) % 65521).float()


def save_until_killed(rank: int, port: int, run_dir: Path, mode: str, diary: Path, first_start: bool) -> None:
    """One rank of a start: load as a training run does, compare, and save one version after the other."""
    place = {"RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    world = init_world(timeout_seconds=120)
    attempt = take_ownership(run_dir, world)
    engine = build_engine(MODEL, OptimConfig(), FSDPConfig(), world, precision="fp32", micro_batch_size=1)
    loaded = load_and_compare(engine, world, run_dir, diary)
    if loaded == 0 and not first_start:
        write(diary, f"BAD rank {rank}: no checkpoint although some were committed\n")
    saver = checkpoint.Saver(run_dir, world, attempt, background=mode == "background")
    for version in count(loaded + 1):
        fill(engine, version)

        def after(path: Path, version: int = version) -> None:
            write(diary, f"committed {version}\n")
            if mode in ("retention", "replacement"):
                checkpoint.prune(run_dir, keep_last=1)

        step = version // 2 if mode == "replacement" else version
        saver.save(engine, TrainState(step=step), {"version": version}, after)


def load_and_compare(engine: Engine, world: World, run_dir: Path, diary: Path) -> int:
    """The version that was loaded, 0 if there was none; whatever is wrong with it goes into the diary."""
    restored = checkpoint.restore(run_dir, engine, world)
    if restored is None:
        return 0
    version = restored.saved["version"]
    for key, partition in engine.state().items():
        if not torch.equal(partition.data, expected(key, version, partition.start, len(partition.data))):
            write(diary, f"BAD rank {world.rank}: {restored.path} loaded as version {version}, but {key} is not that\n")
    committed = last_committed(diary)
    if version < committed:
        write(diary, f"BAD rank {world.rank}: loaded version {version} although {committed} was committed\n")
    if world.rank == 0:
        write(diary, f"loaded {version} passing over {len(restored.passed_over)}\n")
    return version


def fill(engine: Engine, version: int) -> None:
    """Put a version's numbers into weights and optimizer states."""
    for key, partition in engine.state().items():
        partition.data.copy_(expected(key, version, partition.start, len(partition.data)))


def write(diary: Path, line: str) -> None:
    """Append a line at once; whole lines also when killed."""
    descriptor = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def last_committed(diary: Path) -> int:
    """The newest version whose save reported success."""
    lines = diary.read_text().split("\n") if diary.exists() else []
    return max((int(line.split()[1]) for line in lines if line.startswith("committed ")), default=0)


def kill_and_restart(folder: Path, mode: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """`kills` starts that are killed, and one more that must load; counts by phase, and what went wrong."""
    run_dir, diary, phases = folder / mode, folder / f"{mode}.diary", Counter[str]()
    run_dir.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "megagpt.checkpoint.save_load", "megagpt.engine.fsdp", "torch.distributed.fsdp"])
    targets = aims(mode)
    for number in range(kills + 1):
        port, begun = free_port(), last_committed(diary)
        arguments = (port, run_dir, mode, diary, begun == 0)
        ranks = [context.Process(target=save_until_killed, args=(rank, *arguments)) for rank in range(SIZE)]
        for process in ranks:
            process.start()
        wait_until(lambda begun=begun, ranks=ranks: last_committed(diary) > begun or not all(p.is_alive() for p in ranks))
        if number < kills:
            time.sleep(rng.uniform(0, 0.3))
            aim(run_dir, targets[number % len(targets)], rng)
        for rank, process in enumerate(ranks):
            if not process.is_alive():
                write(diary, f"BAD rank {rank} ended by itself with {process.exitcode}\n")
            process.kill()
        for process in ranks:
            process.join()
        if number < kills:
            phases[phase(run_dir, diary)] += 1
    lines = diary.read_text().splitlines()
    loads = [line.split() for line in lines if line.startswith("loaded ")]
    return {
        "kills": kills,
        **{f"killed {name}": phases[name] for name in (*PHASES, "between saves") if phases[name]},
        "restarts_that_loaded": len(loads),
        "checkpoints_passed_over": sum(int(words[-1]) for words in loads),
        "versions_committed": last_committed(diary),
        "wrong": [line for line in lines if line.startswith("BAD")],
    }


def aims(mode: str) -> list[str]:
    """What to wait for before a kill, in turn."""
    common = [
        "temporary write",
        "between write and manifest",
        "between manifest and rename",
        "any",
        "between manifest and rename",
    ]
    more = {"retention": ["during retention"] * 2, "replacement": ["between the renames of a replacement"] * 3}
    return [*common, *more.get(mode, [])]


def aim(run_dir: Path, target: str, rng: random.Random) -> None:
    """Wait until the disk shows that the phase has begun; inside the first one also a random time."""
    folder, end = run_dir / "checkpoints", time.monotonic() + 20
    if target == "any":
        time.sleep(rng.uniform(0, 0.2))
        return
    sizes: dict[str, int] = {}
    while len(sizes) < SIZE:
        with contextlib.suppress(FileNotFoundError, IndexError):
            newest = list_checkpoints(run_dir)[-1]
            sizes = {path.name: path.stat().st_size for path in newest.glob("pieces_*")}
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if seen(folder, target, sizes):
                break
    if target == "temporary write":
        time.sleep(rng.uniform(0, 0.004))


def seen(folder: Path, target: str, sizes: dict[str, int]) -> bool:
    """Whether the phase is under way."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if target == "between the renames of a replacement":
            if "_old_" in name:
                return True
        elif target == "during retention":
            if name.startswith("step_") and not os.path.exists(f"{path}/manifest.json") and os.path.exists(path):
                return True
        elif name.startswith("tmp_") and "_old_" not in name:
            if target == "temporary write":
                return True
            if target == "between manifest and rename" and os.path.exists(f"{path}/manifest.json"):
                return True
            if target == "between write and manifest" and all(os.stat(f"{path}/{n}").st_size == s for n, s in sizes.items()):
                return True
    return False


def phase(run_dir: Path, diary: Path) -> str:
    """What was being done when the ranks were killed, from what they left."""
    folder = run_dir / "checkpoints"
    committed = list_checkpoints(run_dir)
    whole = [path for path in committed if (path / "manifest.json").exists()]
    sizes = {path.name: path.stat().st_size for path in sorted(whole[-1].glob("pieces_*"))} if whole else {}
    temporary = [path for path in folder.glob("tmp_*") if "_old_" not in path.name]
    replaced = list(folder.glob("tmp_*_old_*"))
    if replaced:
        return "between the renames of a replacement" if temporary else "removing what was replaced"
    for path in temporary:
        if (path / "manifest.json").exists():
            return "between manifest and rename"
        found = {file.name: file.stat().st_size for file in path.glob("pieces_*")}
        return "between write and manifest" if found == sizes else "temporary write"
    if len(whole) < len(committed):
        return "during retention"
    newest = read_json(committed[-1] / "state.json")["version"]
    return "after the rename" if newest > last_committed(diary) else "between saves"


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; AssertionError when nothing happens."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "no checkpoint was committed"
        time.sleep(0.005)


def write_good_run(run_dir: Path, versions: tuple[int, ...] = (1, 2)) -> None:
    """A run with whole checkpoints of two rank files each, made by one process."""
    from megagpt.checkpoint.partitions import write_partitions
    from megagpt.files import write_json

    for version in versions:
        folder = run_dir / "checkpoints" / f"step_{version:08d}"
        folder.mkdir(parents=True)
        files = {}
        for rank in range(SIZE):
            shares = {}
            for name, shape in whole_shapes(MODEL).items():
                half = shape.numel() // 2
                start, end = (0, half) if rank == 0 else (half, shape.numel())
                shares[f"param.{name}"] = (start, expected(f"param.{name}", version, start, end - start))
            name, entry = write_partitions(folder, rank, shares)
            files[name] = entry
        write_json(folder / "state.json", {"version": version, "train_state": TrainState(step=version).to_json()})
        checkpoint.seal(folder, files)


def load_whole(run_dir: Path) -> tuple[int, tuple[str, ...]]:
    """The version of the newest good checkpoint, every element compared, and why others were passed over.

    Raises AssertionError if a bad one was loaded.
    """
    path, passed_over = checkpoint.newest_good(run_dir, lone_world(torch.device("cpu")))
    assert path is not None
    version = read_json(path / "state.json")["version"]
    keys = {f"param.{name}": shape.numel() for name, shape in whole_shapes(MODEL).items()}
    partitions = {key: Partition(torch.empty(numel), 0, numel) for key, numel in keys.items()}
    read_partitions(path, partitions)
    for key, partition in partitions.items():
        assert torch.equal(partition.data, expected(key, version, 0, partition.numel)), f"{path}: {key} is wrong"
    return version, passed_over


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """One bit anywhere in the file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """The file ends somewhere before its end."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    """The file is gone."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {"bit flipped": flip_a_bit, "cut": cut, "removed": remove}
FILES = ("pieces_00000.safetensors", "pieces_00001.safetensors", "state.json", "manifest.json")


def damage(folder: Path, times: int, rng: random.Random) -> list[dict[str, Any]]:
    """Every kind of damage to every kind of file of the newest of two checkpoints; what was loaded then."""
    write_good_run(folder / "good")
    rows = []
    for name, act in DAMAGES.items():
        for file in FILES:
            outcome = Counter[str]()
            for _ in range(1 if name == "removed" else times):
                run_dir = folder / "damaged"
                shutil.copytree(folder / "good", run_dir)
                act(run_dir / "checkpoints" / "step_00000002" / file, rng)
                try:
                    version, passed_over = load_whole(run_dir)
                    named = file == "manifest.json" or any(file in reason for reason in passed_over)
                    right = "the one before was loaded, the file named" if named else "WRONG: the file was not named"
                    outcome[right if version == 1 else "loaded, and every element right"] += 1
                except (AssertionError, CheckpointError, UserError) as error:
                    outcome[f"WRONG: {error}"] += 1
                shutil.rmtree(run_dir)
            rows.append({"damage": name, "file": file, "times": sum(outcome.values()), **outcome})
            print(rows[-1], flush=True)
    return rows


def fill_the_disk(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """In a tmpfs at `folder`: saves with a random room left; each must succeed or fail cleanly, and leave a good one."""
    world, rng, outcome = init_world(), random.Random(seed), Counter[str]()
    run_dir, filler = folder / "run", folder / "filler"
    engine = build_engine(MODEL, OptimConfig(), FSDPConfig(), world, precision="fp32", micro_batch_size=1)
    attempt, good, wrong = take_ownership(run_dir, world), 0, []
    fill(engine, 1)
    checkpoint.Saver(run_dir, world, attempt).save(engine, TrainState(step=1), {"version": 1})
    size = sum(file.stat().st_size for file in list_checkpoints(run_dir)[0].iterdir())
    for version in range(2, times + 2):
        room = rng.choice([0, rng.randrange(size), size + rng.randrange(-4096, 16384)])
        filler.write_bytes(b"\0" * max(0, shutil.disk_usage(folder).free - room))
        fill(engine, version)
        saver = checkpoint.Saver(run_dir, world, attempt, background=version % 2 == 0)
        try:
            saver.save(engine, TrainState(step=version), {"version": version}, lambda _: checkpoint.prune(run_dir, keep_last=1))
            saver.close()
            outcome["saved"] += 1
            good = version
        except CheckpointError as error:
            outcome["refused: no space" if "No space left" in str(error) else f"WRONG: {error}"] += 1
        restored = checkpoint.restore(run_dir, engine, world)
        if restored is None or restored.saved["version"] != max(good, 1) or list((run_dir / "checkpoints").glob("tmp_*")):
            wrong.append(f"version {version}: {restored and restored.path} is there")
        filler.unlink()
    close_world()
    return {"saves": times, **outcome, "wrong": wrong}


def in_a_small_disk(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """`fill_the_disk` in a process with a mount of its own."""
    import json

    folder.mkdir()
    script = 'mount -t tmpfs -o size=64m tmpfs "$1" && exec "$2" "$3" --fill-the-disk "$1" --damages "$4" --seed "$5"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh", str(folder)]
    words += [sys.executable, __file__, str(times), str(seed)]
    output = subprocess.run(words, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    """The full form."""
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--damages", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill-the-disk", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.fill_the_disk is not None:
        print(json.dumps(fill_the_disk(arguments.fill_the_disk, arguments.damages, arguments.seed)))
        return
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kills = {}
        for mode in MODES:
            kills[mode] = kill_and_restart(folder, mode, arguments.kills, rng)
            print(mode, kills[mode], flush=True)
        damages = damage(folder, arguments.damages, rng)
        full_disk = in_a_small_disk(folder / "small", arguments.damages, arguments.seed)
        print("full disk", full_disk, flush=True)
    total = Counter[str]()
    for row in kills.values():
        total.update({key: value for key, value in row.items() if key.startswith("killed")})
    wrong = [line for row in kills.values() for line in row["wrong"]] + full_disk["wrong"]
    wrong += [f"{row['damage']} {row['file']}: {key}" for row in damages for key in row if key.startswith("WRONG")]
    result = {"ranks": SIZE, "kills": sum(row["kills"] for row in kills.values()), **total, "wrong": wrong}
    write_results("torn_writes", {**result, "by_mode": kills, "damage": damages, "full_disk": full_disk}, packages=("torch",))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
