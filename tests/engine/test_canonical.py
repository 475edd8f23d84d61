"""In canonical order losses, gradient norms and weights have the same bits on every layout that it is offered on."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy import ADAMW, DATASET, SGD, at_step

from megagpt.config import UserError
from megagpt.data.loader import step_batches
from megagpt.distributed.fetch import Records
from megagpt.distributed.world import World, lone_world
from megagpt.engine.build import build_engine, refuse_unsupported
from megagpt.engine.canonical import BLOCK, BlockNorm, Extent, clip_factor, tree_sum, without_fused_kernels
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig, Precision
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig, build_optimizer, lr_at
from megagpt.model.gpt import ModelConfig

# 500 x 96 elements: blocks of the norm straddle the shards' borders, and 4 ranks get unequal rows of the 2 key/value heads.
MODEL = ModelConfig(vocab_size=500, seq_len=32, num_layers=2, num_heads=6, num_kv_heads=2, hidden_size=96, qk_norm=True)
ENGINES: dict[str, EngineConfig] = {
    "zero1": DeepSpeedConfig(zero_stage=1),
    "fsdp": FSDPConfig(),
    "fsdp_kept": FSDPConfig(reshard_after_forward=False),
}
SHARP = OptimConfig(kind="sgd", lr=0.05, max_grad_norm=0.3)
CASES: list[tuple[OptimConfig, Precision, int]] = [(ADAMW, "fp32", 3), (ADAMW, "bf16", 3), (SHARP, "fp32", 1)]
"""Optimizer, precision, micro-batch size; 14 samples a step make 5 micro-batches of at most 3: no rank count divides them."""
STEPS = 5


def canonical_runs(world: World, cases: list[tuple[OptimConfig, Precision, int]]) -> list[tuple[list[float], str]]:
    """Losses and norms of each step, and the sha256 of this rank's view of all weights, by engine and case."""
    results = []
    for optim, precision, micro_batch_size in cases:
        for config in ENGINES.values():
            options = {"precision": precision, "micro_batch_size": micro_batch_size}
            engine = build_engine(MODEL, optim, config, world, canonical=True, **options)  # type: ignore[arg-type]
            draw_weights(engine, MODEL, seed=1)
            trail = []
            for step in range(STEPS):
                batches = step_batches(
                    DATASET,
                    at_step(step),
                    global_batch_size=14,
                    micro_batch_size=micro_batch_size,
                    rank=world.rank,
                    size=world.size,
                )
                (num_targets,), losses = world.sum([batches.num_targets]), []
                for i, batch in enumerate(batches.micro_batches):
                    loss = engine.model(batch.ids, batch.targets) / num_targets
                    engine.backward(loss, last=i == len(batches.micro_batches) - 1)
                    losses.append(loss.detach())
                result = engine.step(lr_at(optim, step, 100), optim.max_grad_norm)
                assert result.applied
                rows = Records(world).send(torch.stack(losses).double()).read()
                trail += [math.fsum(loss for row in rows for loss in row), result.grad_norm]
            partitions = world.gather({key: (partition.start, partition.data) for key, partition in engine.state().items()})
            digest = hashlib.sha256()
            for key in sorted({key for part in partitions for key in part}):
                for _, data in sorted((part[key] for part in partitions if key in part), key=lambda partition: partition[0]):
                    digest.update(data.numpy().tobytes())
            results.append((trail, digest.hexdigest()))
    return results


@pytest.mark.slow
def test_every_layout_gives_the_same_bits(tmp_path: Path) -> None:
    by_size = {size: run_ranks(canonical_runs, size, tmp_path / str(size), CASES)[0] for size in (1, 2, 4)}
    for number, case in enumerate(CASES):
        runs = {
            (size, name): results[number * len(ENGINES) + i]
            for size, results in by_size.items()
            for i, name in enumerate(ENGINES)
        }
        assert len({digest for _, digest in runs.values()}) == 1, (
            case,
            {cell: digest[:8] for cell, (_, digest) in runs.items()},
        )
        assert len({tuple(trail) for trail, _ in runs.values()}) == 1, case


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_norm_does_not_depend_on_the_cut() -> None:
    generator = torch.Generator().manual_seed(1)
    numels = [3 * BLOCK + 7, 5, BLOCK, 2 * BLOCK - 1]
    gradients = [torch.randn(numel, generator=generator) for numel in numels]
    whole = BlockNorm([Extent(0, n, n) for n in numels], numels, range(4), lone_world(torch.device("cpu")))
    with one_rank():
        expected = whole(gradients)
        assert float(expected) == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)), rel=1e-12)
        for cut in (1, 100, BLOCK - 1, BLOCK, BLOCK + 1):
            partitions = [(i, start) for i, numel in enumerate(numels) for start in range(0, numel, cut)]
            extents = [Extent(start, min(cut, numels[i] - start), numels[i]) for i, start in partitions]
            norm = BlockNorm(extents, numels, [i for i, _ in partitions], lone_world(torch.device("cpu")))
            cuts = [gradients[i][start : start + cut] for i, start in partitions]
            assert torch.equal(norm(cuts), expected), cut


def test_an_update_does_not_depend_on_the_cut() -> None:
    """torch's fused AdamW differs in about 1 of 2,000 elements on CPUs: those at a tensor's end take another path."""
    generator = torch.Generator().manual_seed(1)

    def updated(weights: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.1, "kind": "adamw"}], ADAMW)
        without_fused_kernels(optimizer)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    for _ in range(60):
        weights, gradients = torch.randn(160, generator=generator), torch.randn(5, 160, generator=generator) * 0.01
        cuts = [updated(weights[i : i + 7], gradients[:, i : i + 7]) for i in range(0, 160, 7)]
        assert torch.equal(torch.cat(cuts), updated(weights, gradients))


def test_tree_sum_and_clip_factor() -> None:
    rows = torch.arange(21, dtype=torch.float64).view(3, 7)
    assert tree_sum(rows).tolist() == [21.0, 70.0, 119.0]
    assert clip_factor(2.0, 1.0) == pytest.approx(0.5)
    assert clip_factor(2.0, 0.0) == 1.0
    assert clip_factor(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("engine", "optim", "what"),
    [
        (DeepSpeedConfig(zero_stage=2), ADAMW, "zero_stage=2"),
        (FSDPConfig(shard_size=2), ADAMW, "shard_size=2"),
        (FSDPConfig(cpu_offload=True), ADAMW, "cpu_offload"),
        (FSDPConfig(), OptimConfig(kind="muon"), "muon"),
    ],
)
def test_what_has_no_order_is_refused(engine: EngineConfig, optim: OptimConfig, what: str) -> None:
    with pytest.raises(UserError, match=f"determinism=canonical with .*{what}"):
        refuse_unsupported(engine, optim, "fp32", canonical=True)
    refuse_unsupported(engine, SGD, "fp32")
