"""Muon on flat partitions: the update of torch's Muon, nothing before the matrices are dealt, and owners with equal work."""

from typing import Any

import pytest
import torch
from toy import MUON

from megagpt.distributed.world import lone_world
from megagpt.engine.dealt_matrices import DealtMatrices, Held, owners_of
from megagpt.engine.optim import build_optimizer, create_states

SHAPES = {"blocks.0.a": (6, 4), "blocks.0.b": (3, 8)}
PADDING = 5
"""Elements of the partition that belong to no matrix, as DeepSpeed aligns them."""


def partitions() -> tuple[torch.nn.Parameter, torch.nn.Parameter, list[Held]]:
    """A flat partition of two matrices, one of a vector, and what is where."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    flat = torch.nn.Parameter(torch.randn(sum(sizes.values()) + PADDING, generator=generator))
    held, offset = [], 0
    for name, shape in SHAPES.items():
        held.append(Held(name, shape, offset, 0, sizes[name]))
        offset += sizes[name]
    return flat, torch.nn.Parameter(torch.randn(7, generator=generator)), held


def groups_of(matrices: list[torch.nn.Parameter], vector: torch.nn.Parameter) -> list[dict[str, Any]]:
    return [
        {"params": matrices, "weight_decay": 0.1, "kind": "muon"},
        {"params": [vector], "weight_decay": 0.0, "kind": "adamw"},
    ]


def test_the_update_is_that_of_whole_matrices() -> None:
    flat, vector, held = partitions()
    whole = [torch.nn.Parameter(flat.detach()[h.offset : h.offset + h.length].clone().view(h.shape)) for h in held]
    other = torch.nn.Parameter(vector.detach().clone())
    dealt, plain = DealtMatrices(groups_of([flat], vector), MUON), build_optimizer(groups_of(whole, other), MUON)
    create_states(dealt, [(flat, "muon"), (vector, "adamw")])
    before, generator = flat.detach().clone(), torch.Generator().manual_seed(1)
    for step in range(4):
        flat.grad, vector.grad = torch.randn(len(flat), generator=generator), torch.randn(7, generator=generator)
        if step == 0:
            dealt.step()  # as DeepSpeed may while it sets itself up
            assert torch.equal(flat, before)
            dealt.deal({flat: held}, lone_world(torch.device("cpu")))
        for matrix, h in zip(whole, held, strict=True):
            matrix.grad = flat.grad[h.offset : h.offset + h.length].view(h.shape)
        other.grad = vector.grad
        dealt.step()
        plain.step()
    for matrix, h in zip(whole, held, strict=True):
        # decayed and moved in another order of roundings; an update is of size 2e-3 x 0.2 x sqrt(8)
        torch.testing.assert_close(
            flat.detach()[h.offset : h.offset + h.length].view(h.shape), matrix.detach(), atol=1e-6, rtol=0
        )
        assert (
            float((flat[h.offset : h.offset + h.length] - before[h.offset : h.offset + h.length]).detach().abs().max()) > 1e-3
        )
    assert torch.equal(vector, other)
    assert torch.equal(
        dealt.state[flat]["momentum_buffer"][: held[0].length].view(6, 4), plain.state[whole[0]]["momentum_buffer"]
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_owners_have_equal_work(ranks: int) -> None:
    shapes = {f"blocks.{i}.{name}": shape for i in range(24) for name, shape in (("query", (64, 64)), ("up", (256, 64)))}
    owners = owners_of(shapes, ranks)
    assert owners.keys() == shapes.keys()
    load = [sum(min(shapes[n]) ** 2 * max(shapes[n]) for n in shapes if owners[n] == rank) for rank in range(ranks)]
    assert max(load) <= 1.05 * sum(load) / ranks
    assert owners == owners_of(dict(reversed(shapes.items())), ranks), "the same on every rank"


def test_a_dear_matrix_has_an_owner_of_its_own() -> None:
    shapes = {"embedding_like": (512, 512), **{f"small{i}": (64, 64) for i in range(9)}}
    owners = owners_of(shapes, 2)
    assert {owners[name] for name in shapes if name != "embedding_like"} == {1 - owners["embedding_like"]}
