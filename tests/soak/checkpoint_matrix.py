"""Every layout reads what every layout wrote, bit for bit, and goes on as if nothing had happened.

    python tests/soak/checkpoint_matrix.py [--variants adamw_tied,...]                       (about 30 minutes on two cores)
    python tests/soak/checkpoint_matrix.py --losses 3 --variants adamw_tied --no-pairs     (a short form)

A plain torch loop trains 5 steps; its weights and optimizer states are the reference checkpoint. Layouts are the engines and
stages of toy.py (ZeRO 0 to 3, FSDP2 with both reshard policies, HSDP, hpZ, offload) on 1 to 4 ranks; variants: AdamW with
two parameter groups, tied head, untied head and bf16; Muon, SGD and AdaBelief, each on every layout it is offered on. With
fewer than all variants the rows of the others stay as they are in the results.

1. Each layout loads the reference, saves it again, and trains on: every tensor it wrote must equal the reference's bit for bit,
   and its losses those of the plain loop that went on (fp32: within 1e-6 over 20 steps; bf16 is only reported, and so is Muon,
   which orthogonalises in bf16: the plain loop split differently drifts as far from itself, `plain_split_max_loss_difference`).
2. Each layout then loads what each of the others wrote: its state must be bit for bit what it had after loading the reference,
   and so must the next two losses.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from parity import MICRO_BATCH_SIZES, largest_difference, plain_optimizer, plain_steps  # noqa: E402
from ranks import run_ranks  # noqa: E402
from toy import MODEL, OPTIMIZERS, UNTIED, engines_on, make_engine, offered_on, train_steps, variations_on  # noqa: E402

from megagpt.checkpoint import save_load as checkpoint  # noqa: E402
from megagpt.checkpoint.on_disk import FORMAT, list_checkpoints  # noqa: E402
from megagpt.checkpoint.ownership import take_ownership  # noqa: E402
from megagpt.checkpoint.partitions import index_of, write_partitions  # noqa: E402
from megagpt.data.state import TrainState  # noqa: E402
from megagpt.distributed.world import World  # noqa: E402
from megagpt.engine.base import Engine  # noqa: E402
from megagpt.engine.config import Precision  # noqa: E402
from megagpt.engine.optim import STATES  # noqa: E402
from megagpt.files import write_json  # noqa: E402
from megagpt.measurement import RESULTS, write_results  # noqa: E402
from megagpt.model.gpt import GPT, ModelConfig, initialise  # noqa: E402

TRAINED, TOLERANCE, PAIR_LOSSES = 5, 1e-6, 2


@dataclass(frozen=True, slots=True)
class Variant:
    """What is trained."""

    optimizer: str
    model: ModelConfig = MODEL
    precision: Precision = "fp32"

    def offered_on(self, engine: str) -> bool:
        """Whether the engine takes this optimizer and precision."""
        return offered_on(engine, self.optimizer) and not (self.precision == "bf16" and engine == "zero0")


VARIANTS = {
    "adamw_tied": Variant("adamw"),
    "adamw_untied": Variant("adamw", UNTIED),
    "adamw_bf16": Variant("adamw", precision="bf16"),
    "muon_tied": Variant("muon"),
    "muon_untied": Variant("muon", UNTIED),
    **{kind: Variant(kind) for kind in OPTIMIZERS if kind not in ("adamw", "muon")},
}


def train_plain(variant: Variant) -> tuple[GPT, Any]:
    """The plain loop's model and optimizer after the first steps."""
    optim = OPTIMIZERS[variant.optimizer]
    model = GPT(variant.model)
    initialise(model, seed=1)
    optimizer = plain_optimizer(model, optim)
    plain_steps(model, optimizer, optim, range(TRAINED))
    return model, optimizer


def plain_split(name: str, losses: int, expected: list[float]) -> float:
    """The yardstick: how far the plain loop drifts from itself if from the checkpoint on it splits its batches differently."""
    variant, steps, worst = VARIANTS[name], range(TRAINED, TRAINED + losses), 0.0
    for size in MICRO_BATCH_SIZES:
        model, optimizer = train_plain(variant)
        found = plain_steps(model, optimizer, OPTIMIZERS[variant.optimizer], steps, micro_batch_size=size)
        worst = max(worst, largest_difference(found, expected))
    return worst


def make_reference(run_dir: Path, variant: Variant, losses: int) -> list[float]:
    """Train a plain loop, write its state as a checkpoint by hand, and train on: the losses after it."""
    model, optimizer = train_plain(variant)
    optim = OPTIMIZERS[variant.optimizer]
    kinds = {p: group.get("kind", optim.kind) for group in optimizer.param_groups for p in group["params"]}
    shares = {}
    for name, parameter in model.named_parameters():
        shares[f"param.{name}"] = (0, parameter.detach().flatten())
        for key in STATES[kinds[parameter]]:
            shares[f"{key}.{name}"] = (0, optimizer.state[parameter][key].flatten())
    folder = run_dir / "checkpoints" / f"step_{TRAINED:08d}"
    folder.mkdir(parents=True)
    name, entry = write_partitions(folder, 0, shares)
    state = {"train_state": TrainState(step=TRAINED).to_json(), "updates": TRAINED, "format": FORMAT}
    write_json(folder / "state.json", state)
    checkpoint.seal(folder, {name: entry})
    return plain_steps(model, optimizer, optim, range(TRAINED, TRAINED + losses))


def rewrite(world: World, root: Path, names: list[str], losses: int, layouts: list[str]) -> dict[tuple[str, str], list[float]]:
    """On these ranks every engine loads the reference of each variant, saves it, and trains on; losses by (variant, engine)."""
    results = {}
    for variant_name in names:
        variant = VARIANTS[variant_name]
        for engine_name in filter(variant.offered_on, layouts):
            engine, copy = build(world, variant, engine_name), root / variant_name / f"{engine_name}_{world.size}"
            restored = checkpoint.restore(root / variant_name / "reference", engine, world)
            assert restored is not None
            attempt = take_ownership(copy, world)
            saver = checkpoint.Saver(copy, world, attempt, background=world.size % 2 == 0)
            saver.save(engine, restored.state, {})
            assert engine.updates == TRAINED
            # What is written in the background must be the state of now, whatever training does meanwhile.
            results[variant_name, engine_name] = continue_from(engine, world, variant, losses)
            saver.close()
    return results


def read_all(world: World, root: Path, names: list[str], layouts: list[str]) -> dict[tuple[str, str], list[str]]:
    """On these ranks every engine loads every copy of each variant; by (variant, engine) the writers it differed from."""
    results = {}
    for variant_name in names:
        variant, folder = VARIANTS[variant_name], root / variant_name
        for engine_name in filter(variant.offered_on, layouts):
            engine, wrong = build(world, variant, engine_name), []
            expected = load(engine, world, variant, folder / "reference")
            for copy in sorted(path for path in folder.iterdir() if path.name != "reference"):
                if world.any(not same(load(engine, world, variant, copy), expected)):
                    wrong.append(copy.name)
            results[variant_name, engine_name] = wrong
    return results


def build(world: World, variant: Variant, engine_name: str) -> Engine:
    """The engine, with the weights that memory happened to hold."""
    return make_engine(world, engine_name, OPTIMIZERS[variant.optimizer], model=variant.model, precision=variant.precision)


def continue_from(engine: Engine, world: World, variant: Variant, losses: int) -> list[float]:
    """The next losses."""
    return train_steps(engine, world, range(TRAINED, TRAINED + losses), OPTIMIZERS[variant.optimizer])


def load(engine: Engine, world: World, variant: Variant, run_dir: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What this rank holds after a load, and the next two losses."""
    assert checkpoint.restore(run_dir, engine, world) is not None
    partitions = {key: partition.data.clone() for key, partition in engine.state().items()}
    return partitions, continue_from(engine, world, variant, PAIR_LOSSES)


def same(found: tuple[dict[str, torch.Tensor], list[float]], expected: tuple[dict[str, torch.Tensor], list[float]]) -> bool:
    """Bit for bit."""
    (partitions, losses), (their_partitions, their_losses) = found, expected
    equal = partitions.keys() == their_partitions.keys() and all(
        torch.equal(partitions[key], their_partitions[key]) for key in partitions
    )
    return equal and losses == their_losses


def whole_tensors(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of a run's only checkpoint put together from its files, as bytes."""
    (path,) = list_checkpoints(run_dir)
    result = {}
    for key, runs in index_of(path).items():
        full = np.full(sum(run.length for run in runs), np.nan, dtype=np.float32)
        for run in runs:
            with safe_open(path / run.file, framework="np") as file:
                full[run.start : run.start + run.length] = file.get_tensor(key)
        result[key] = full.tobytes()
    return result


def matrix(
    root: Path, names: list[str], losses: int, layouts: dict[int, list[str]], read_on: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both parts, the second on `read_on` ranks; `layouts` by number of ranks. Rows of the two tables."""
    expected = {name: make_reference(root / name / "reference", VARIANTS[name], losses) for name in names}
    references = {name: whole_tensors(root / name / "reference") for name in names}
    drifts = {name: plain_split(name, losses, expected[name]) for name in names}
    writers, readers = [], []
    for size, engines in layouts.items():
        found = run_ranks(rewrite, size, root / f"ranks_{size}", root, names, losses, engines, timeout_seconds=3600)[0]
        for (name, engine), values in found.items():
            written = whole_tensors(root / name / f"{engine}_{size}")
            equal = sum(written.get(key) == value for key, value in references[name].items())
            row = {"variant": name, "engine": engine, "ranks": size, "tensors": len(references[name]), "tensors_bitwise": equal}
            row |= {"max_loss_difference": largest_difference(values, expected[name]), "losses": losses}
            row |= {"plain_split_max_loss_difference": drifts[name]}
            assert written.keys() == references[name].keys()
            writers.append(row)
            print(row, flush=True)
    for size in read_on:
        found = run_ranks(read_all, size, root / f"ranks_{size}", root, names, layouts[size], timeout_seconds=3600)[0]
        for (name, engine), wrong in found.items():
            copies = sum(row["variant"] == name for row in writers)
            row = {"variant": name, "engine": engine, "ranks": size, "writers": copies, "writers_bitwise": copies - len(wrong)}
            readers.append(row | {"differing": wrong})
            print(readers[-1], flush=True)
    return writers, readers


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--no-pairs", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.variants.split(",")
    layouts = {size: [*engines_on(size), *variations_on(size)] for size in (1, 2, 3, 4)}
    with tempfile.TemporaryDirectory() as folder:
        writers, readers = matrix(Path(folder), names, arguments.losses, layouts, () if arguments.no_pairs else tuple(layouts))
    before = earlier()
    writers += [row for row in before.get("writers", []) if row["variant"] not in names]
    readers += [row for row in before.get("readers", []) if row["variant"] not in names]
    fp32 = [row for row in writers if VARIANTS[row["variant"]].precision == "fp32"]
    exact = [row for row in fp32 if not row["variant"].startswith("muon")]
    result = {
        "layouts_written": len(writers),
        "layouts_written_bitwise": sum(row["tensors"] == row["tensors_bitwise"] for row in writers),
        "fp32_layouts": len(fp32),
        "fp32_layouts_within_1e-6": sum(row["max_loss_difference"] < TOLERANCE for row in fp32),
        "fp32_max_loss_difference_without_muon": max((row["max_loss_difference"] for row in exact), default=None),
        "fp32_max_loss_difference": max((row["max_loss_difference"] for row in fp32), default=None),
        "fp32_plain_split_max_loss_difference": max((row["plain_split_max_loss_difference"] for row in fp32), default=None),
        "pairs_read": sum(row["writers"] for row in readers),
        "pairs_read_bitwise": sum(row["writers_bitwise"] for row in readers),
        "writers": writers,
        "readers": readers,
    }
    write_results("checkpoint_matrix", result, packages=("torch", "deepspeed", "safetensors"))


def earlier() -> dict[str, Any]:
    """The tables as they are."""
    path = RESULTS / "checkpoint_matrix.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}


if __name__ == "__main__":
    main()
