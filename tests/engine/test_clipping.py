"""The device's decision to clip and to leave an update out is the host's, bit for bit, and fetches nothing."""

import math
from typing import Any

import pytest
import torch

from megagpt.engine import clipping
from megagpt.engine.clipping import clip_and_update, decides_on_device
from megagpt.engine.optim import OptimConfig, build_optimizer


def updated(monkeypatch: pytest.MonkeyPatch, scales: list[float], max_norm: float, *, on_device: bool) -> dict[str, Any]:
    """Weights, states and results after an update with gradients of each scale; how often values were fetched."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((33, 5), (7,), (64, 64))]
    groups = [{"params": parameters, "weight_decay": 0.1, "kind": "adamw"}]
    optimizer = build_optimizer(groups, OptimConfig())
    assert decides_on_device(optimizer)
    fetches: list[int] = []
    original = clipping.fetched
    monkeypatch.setattr(clipping, "decides_on_device", lambda _: on_device)
    monkeypatch.setattr(clipping, "fetched", lambda values: (fetches.append(1), original(values))[1])
    results = []
    for scale in scales:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * scale
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        results.append(clip_and_update(optimizer, gradients, norm, max_norm).tolist())
    states = [value for parameter in parameters for _, value in sorted(optimizer.state[parameter].items())]
    return {"tensors": [*parameters, *states], "results": results, "fetches": len(fetches)}


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 0.37])
def test_on_the_device_and_on_the_host_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, max_norm: float) -> None:
    scales = [1e-3, 0.7, 1e4, math.inf, 0.011, math.nan, 3.3, *(0.013 * 1.7**i for i in range(12))]
    device = updated(monkeypatch, scales, max_norm, on_device=True)
    host = updated(monkeypatch, scales, max_norm, on_device=False)
    assert [applied for _, applied in device["results"]].count(0.0) == 2
    assert repr(device["results"]) == repr(host["results"])
    for one, other in zip(device["tensors"], host["tensors"], strict=True):
        assert torch.equal(one, other)
    assert (device["fetches"], host["fetches"]) == (0, len(scales))


def test_other_optimizers_decide_on_the_host() -> None:
    parameters = [torch.nn.Parameter(torch.ones(4, 4))]
    for kind in ("sgd", "muon", "adabelief"):
        groups = [{"params": parameters, "weight_decay": 0.1, "kind": kind}, {"params": [], "weight_decay": 0, "kind": "adamw"}]
        groups = groups if kind == "muon" else groups[:1]
        groups[-1]["params"] = groups[-1]["params"] or [torch.nn.Parameter(torch.ones(4))]
        assert not decides_on_device(build_optimizer(groups, OptimConfig(kind=kind)))
