"""What ranks that share samples hold, send and compute, by group size and method, on a CPU.

    python -m bench.training.context_parallel                about 3 minutes on 2 cores
    python -m bench.training.context_parallel short=true     a tiny model; writes nothing

A Llama of 4 layers, width 256, 8 heads (2 of keys and values), samples of 2,048 tokens in fp32, on 4 processes. Kept: bytes
that autograd keeps of one sample on one rank for the backward pass, without weights; the [T / n, T] masks that gather needs
on CPUs are counted apart (GPUs use blocks of them). Sent: bytes that a rank sends to others around attention in both
passes, counted, against what the planner says. CPU: seconds of all processes per step of 4 samples, engine fsdp, against
group size 1: beside the exchange, ulysses repeats keys and values where they have fewer heads than ranks, and gather
attends under a mask of its own instead of the plain causal one.
"""

import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from bench.ranks import run_ranks
from megagpt.distributed.mesh import with_context_parallel
from megagpt.distributed.world import World
from megagpt.engine.build import build_engine
from megagpt.engine.config import FSDPConfig
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig
from megagpt.measurement import write_results
from megagpt.model.context_parallel import ContextParallel, ContextParallelMethod
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.plan.communication import step_traffic
from megagpt.plan.measured import CollectiveCounter
from megagpt.plan.timeline import Job

RANKS, STEPS = 4, 4
MODEL = ModelConfig(vocab_size=512, seq_len=2048, num_layers=4, num_heads=8, num_kv_heads=2, hidden_size=256)
TINY = MODEL.model_copy(update={"seq_len": 64, "num_layers": 2, "hidden_size": 64})
CELLS: tuple[tuple[int, ContextParallelMethod], ...] = (
    (1, "ulysses"), (2, "ulysses"), (4, "ulysses"), (2, "gather"), (4, "gather"),
)  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Measure, print and write the table."""
    short = "short=true" in words
    found = run_ranks(measure, RANKS, TINY if short else MODEL)
    rows: list[dict[str, Any]] = []
    for number, (size, method) in enumerate(CELLS):
        by_rank = [results[number] for results in found]
        row: dict[str, Any] = {"context_parallel_size": size, "method": method if size > 1 else "-"}
        row |= {key: max(one[key] for one in by_rank) for key in ("kept_mib", "mask_mib", "sent_mib", "planned_mib")}
        row["cpu_s"] = median(map(sum, zip(*(one["cpu_s"] for one in by_rank), strict=True)))
        rows.append(row)
    for row in rows:
        row["kept_times_size_ratio"] = row["kept_mib"] * row["context_parallel_size"] / rows[0]["kept_mib"]
        row["cpu_ratio"] = row["cpu_s"] / rows[0]["cpu_s"]
        print(json.dumps(row), flush=True)
    if not short:
        results = {
            "title": "Context parallelism: activations, bytes and CPU time",
            "about": (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip(),
            "rows": [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows],
            "lost": "",
        }
        write_results("context_parallel", results, packages=("torch",))


def measure(world: World, model: ModelConfig) -> list[dict[str, Any]]:
    """Of every cell what this rank holds, sends and computes."""
    results = []
    for size, method in CELLS:
        shared = with_context_parallel(world, size)
        results.append({**one_sample(shared, model, method), "cpu_s": step_seconds(shared, model, method)})
    return results


def one_sample(world: World, model: ModelConfig, method: ContextParallelMethod) -> dict[str, float]:
    """MiB that autograd keeps, and that is sent, of one sample; every group has one."""
    gpt, ids = GPT(model), torch.zeros(1, model.seq_len, dtype=torch.int64)
    initialise(gpt, seed=1)
    if world.cp_size > 1:
        gpt.context_parallel = ContextParallel(method, world.cp_rank, world.cp_size, world.cp_group)
    kept: dict[int, tuple[int, bool]] = {}
    mask_shape = (model.seq_len // world.cp_size, model.seq_len)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor.shape[-2:] == mask_shape)
        return tensor

    with CollectiveCounter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = gpt(ids, ids)
        weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
        held = [(nbytes, is_mask) for pointer, (nbytes, is_mask) in kept.items() if pointer not in weights]
        loss.backward()
    engine = FSDPConfig(context_parallel_size=world.cp_size, context_parallel_method=method)
    job = Job(model, engine, OptimConfig(), "fp32", 1, model.seq_len // world.cp_size, world.size)
    planned = sum(item.sent for item in step_traffic(job) if item.collective == "all-to-all")
    sent = counter.bytes.get("all-to-all", 0) * (world.cp_size - 1) / world.cp_size
    return {
        "kept_mib": sum(nbytes for nbytes, is_mask in held if not is_mask) / 2**20,
        "mask_mib": sum(nbytes for nbytes, is_mask in held if is_mask) / 2**20,
        "sent_mib": sent / 2**20,
        "planned_mib": planned / 2**20,
    }


def step_seconds(world: World, model: ModelConfig, method: ContextParallelMethod) -> list[float]:
    """CPU seconds of this process in each step of RANKS samples."""
    config = FSDPConfig(context_parallel_size=world.cp_size, context_parallel_method=method)
    engine = build_engine(model, OptimConfig(), config, world, precision="fp32", micro_batch_size=1)
    draw_weights(engine, model, seed=1)
    ids, seconds = torch.zeros(1, model.seq_len, dtype=torch.int64), []
    for _ in range(STEPS):
        begin = time.process_time()
        for number in range(world.cp_size):  # fewer groups, more micro-batches for each
            engine.backward(engine.model(ids, ids) / (RANKS * model.seq_len), last=number == world.cp_size - 1)
        engine.step(1e-4, 1.0)
        seconds.append(time.process_time() - begin)
    return seconds[1:]


if __name__ == "__main__":
    main(sys.argv[1:])
