"""What each rank of a 6.7B and a 13B model holds on 64 and 1,024 ranks: the real engines on a fake process group.

    python tests/soak/sharded_sizes.py                                                   (about 5 minutes)
    python tests/soak/sharded_sizes.py --models gpt_7b --ranks 1024 --engines fsdp       (a short form)

torch.testing._internal.distributed.fake_pg gives one process a group of any size that sends nothing. On it our FSDP2 engine
(and HSDP in nodes of 8) is built as for a run, from the meta device, and ZeRO 3 with deepspeed.zero.Init; only drawing weights
is left out. What the first, a middle and the last rank hold is compared with what the layouts' rules give, computed from the
shapes alone: FSDP2 shards rows by torch.chunk's rule, ZeRO 3 cuts every flattened parameter in equal parts, the last padded.
ZeRO 1 and 2 keep the whole bf16 model on each rank, more than this host has, and are not built: their fp32 states are 1/ranks
of each group of parameters laid end to end (tests/engine/test_parity.py counts them on small models).

Bytes in bf16 training: master weights and two moments 4 each; working weights: ZeRO 3 keeps a bf16 shard beside the masters,
FSDP2 casts while it gathers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]

from megagpt.config import load  # noqa: E402
from megagpt.distributed.world import World  # noqa: E402
from megagpt.engine.build import build_engine, whole_shapes  # noqa: E402
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig  # noqa: E402
from megagpt.engine.optim import OptimConfig  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402
from megagpt.model.gpt import ModelConfig  # noqa: E402

ENGINES: dict[str, EngineConfig] = {
    "fsdp": FSDPConfig(),
    "hsdp": FSDPConfig(shard_size=8),
    "zero3": DeepSpeedConfig(zero_stage=3, stage3_persistence_elements=0),
}
KINDS = ("param", "exp_avg", "exp_avg_sq")


def model_of(config: str) -> ModelConfig:
    """The model of configs/train/<config>.yaml."""
    from megagpt.train.config import TrainConfig

    return load(TrainConfig, [str(PROJECT / "configs" / "train" / f"{config}.yaml")]).model


def expected_elements(engine: str, shapes: dict[str, torch.Size], size: int, rank: int) -> int:
    """Elements of the fp32 weights that a rank holds by the layout's rule."""
    if engine in ("fsdp", "hsdp"):
        shards = 8 if engine == "hsdp" else size
        rows = {name: -(-shape[0] // shards) for name, shape in shapes.items()}  # torch.chunk
        place = rank % shards
        held = {name: max(0, min(shape[0], (place + 1) * rows[name]) - place * rows[name]) for name, shape in shapes.items()}
        return sum(held[name] * (shape.numel() // shape[0]) for name, shape in shapes.items())
    parts = [(shape.numel(), -(-shape.numel() // size)) for shape in shapes.values()]
    return sum(max(0, min(part, numel - rank * part)) for numel, part in parts)


def build(engine: str, model: ModelConfig, size: int, rank: int) -> dict[str, Any]:
    """Build the engine as this rank of a fake group, and count what it holds."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({key: str(value) for key, value in places.items()})
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    world = World(rank, size, 0, torch.device("cpu"), "none", None)
    for name in ("kaiming_uniform_", "normal_", "uniform_", "ones_"):
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)  # minutes for values that nobody looks at
    began = time.perf_counter()
    built = build_engine(model, OptimConfig(), ENGINES[engine], world, precision="bf16", micro_batch_size=1)
    seconds = time.perf_counter() - began
    held: dict[str, int] = dict.fromkeys(KINDS, 0)
    for key, partition in built.state().items():
        assert partition.data.dtype == torch.float32
        held[key.partition(".")[0]] += len(partition.data)
    working = sum(_working_bytes(parameter) for parameter in built.module.parameters())
    return {**held, "working_bytes": working, "build_s": seconds}


def _working_bytes(parameter: Any) -> int:
    return parameter.ds_tensor.nbytes if hasattr(parameter, "ds_tensor") else parameter.to_local().nbytes


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt_7b,gpt_13b")
    parser.add_argument("--ranks", default="64,1024")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--one", nargs=4, metavar=("ENGINE", "CONFIG", "SIZE", "RANK"))
    arguments = parser.parse_args()
    if arguments.one:
        engine, config, size, rank = arguments.one
        print(json.dumps(build(engine, model_of(config), int(size), int(rank))))
        return
    rows = []
    for config in arguments.models.split(","):
        for size in map(int, arguments.ranks.split(",")):
            for engine in arguments.engines.split(","):
                rows.append(row_of(engine, config, size))
                print(rows[-1], flush=True)
    write_results("sharded_sizes", {"rows": rows}, packages=("torch", "deepspeed"))
    raise SystemExit(0 if all(row["as_computed"] for row in rows) else 1)


def row_of(engine: str, config: str, size: int) -> dict[str, Any]:
    """Three ranks of one layout, beside what the rule gives them, and the rule's sum over all ranks."""
    shapes = whole_shapes(model_of(config))
    total = sum(shape.numel() for shape in shapes.values())
    copies = size // 8 if engine == "hsdp" else 1
    assert sum(expected_elements(engine, shapes, size, rank) for rank in range(size)) == total * copies
    places, found = (0, size // 2 + 1, size - 1), []
    for rank in places:
        command = [sys.executable, __file__, "--one", engine, config, str(size), str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    expected = [expected_elements(engine, shapes, size, rank) for rank in places]
    fp32 = [4 * sum(held[kind] for kind in KINDS) for held in found]
    return {
        "model": config,
        "parameters": total,
        "engine": engine,
        "ranks": size,
        "looked_at_ranks": list(places),
        "elements_of_weights": [held["param"] for held in found],
        "elements_as_computed": expected,
        "as_computed": all(held[kind] == count for held, count in zip(found, expected, strict=True) for kind in KINDS),
        "fp32_state_mb": [round(count / 1e6, 2) for count in fp32],
        "working_weights_mb": [round(held["working_bytes"] / 1e6, 2) for held in found],
        "max_build_s": round(max(held["build_s"] for held in found), 1),
    }


if __name__ == "__main__":
    main()
