"""The floor: the loop that one would write by hand around the same model and optimizer, under compare.py's clock.

Layouts on several processes: ddp, or fsdp (fully_shard of each block and the whole, as torch's tutorial has it).
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.training.clock import Clock, Rows, adamw, read_job
from megagpt.model.gpt import GPT, ModelConfig, initialise


def main() -> None:
    """Train; every contender's job has the same keys."""
    job, clock, losses = read_job(), Clock(), []
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = job["device"]
    model = GPT(ModelConfig(**job["model"]))
    initialise(model, job["seed"])
    model.to(device)
    for block in model.blocks if job["compile"] else ():
        block.compile()
    sharded = size > 1 and job["layout"] == "fsdp"
    forward, bf16 = model, job["precision"] == "bf16"
    if size > 1:
        dist.init_process_group("gloo")
    if sharded:
        options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)} if bf16 else {}
        for unit in [*model.blocks, model]:
            fully_shard(unit, **options)
    elif size > 1:
        forward = DistributedDataParallel(model)
    optimizer = adamw(model, job)
    rows, batch_size = Rows(job), job["micro_batch_size"]
    for step in range(job["steps"]):
        start = (step * size + rank) * batch_size
        tokens = torch.stack([rows[start + i] for i in range(batch_size)]).to(device)
        with torch.autocast(device, torch.bfloat16) if bf16 and not sharded else nullcontext():
            loss = forward(tokens[:, :-1], tokens[:, 1:]) / (batch_size * job["seq_len"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    clock.write(job["steps"], losses[job["log_every_steps"] - 1 :: job["log_every_steps"]])


if __name__ == "__main__":
    main()
