"""Norms by layer, every n steps: weights, gradients, and updates relative to their weights. Engines need no code for it.

Every engine shows this rank's fp32 weights and moments (Engine.state). They are copied to the host before an update and
compared after it: the difference of the weights is the update, and the first moment gives back the gradient that went into
it. Squares are added over the shards of all ranks; what several ranks hold counts once.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megagpt.distributed.fetch import fetched
from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.engine.canonical import clip_factor
from megagpt.engine.optim import OptimConfig

SQUARES = ("weight", "gradient", "update")


class LayerNorms:
    """Measures one update in `every_steps`; none if that is 0. All ranks call it together. No bit of the training changes."""

    def __init__(self, every_steps: int, optim: OptimConfig, world: World) -> None:
        self._every_steps, self._optim, self._world = every_steps, optim, world
        self._before: dict[str, Tensor] | None = None

    def before(self, engine: Engine, step: int) -> None:
        """Call it before an update, after `step` of them. A measured one copies 8 bytes per weight of this rank to the host."""
        self._before = None
        if self._every_steps and (step + 1) % self._every_steps == 0:
            kept = {
                name: part.data for name, part in engine.state().items() if _state_of(name) in ("param", *_decays(self._optim))
            }
            self._before = {name: data.detach().to("cpu", copy=True) for name, data in kept.items()}

    def after(self, engine: Engine, result: Tensor, max_norm: float) -> dict[str, dict[str, float]] | None:
        """Norms by layer of the last update, of which launch_step gave `result`; None: it was not measured, or not applied.

        weight: L2 norm of the weights it was made to. gradient: norm before clipping; not with sgd, whose moment holds weight
        decay too. update_ratio: norm of the change over that of the weights.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        grad_norm, applied = fetched(result)
        if not applied:
            return None
        squares: dict[str, dict[str, float]] = {}
        for name, part in engine.state().items():
            if name not in before:
                continue
            state, _, parameter = name.partition(".")
            old, new = before[name].to(part.data.device), part.data.detach()
            found = squares.setdefault(layer_of(parameter), {})
            if state == "param":
                _add(found, "weight", old, part.copies)
                _add(found, "update", new - old, part.copies)
            else:
                decay = _decays(self._optim)[state]
                _add(found, "gradient", (new - decay * old) / (1 - decay), part.copies)
        return _norms(self._world.gather(squares), clip_factor(grad_norm, max_norm))


def layer_of(parameter: str) -> str:
    """block_007 for blocks.7.attention.query.weight, embedding for embedding.weight."""
    first, _, rest = parameter.partition(".")
    return f"block_{int(rest.partition('.')[0]):03d}" if first == "blocks" else first


def _decays(optim: OptimConfig) -> dict[str, float]:
    """Moments that are (1 - decay) * gradient + decay * before, and their decays."""
    decays = {"adamw": {"exp_avg": optim.beta1}, "adabelief": {"exp_avg": optim.beta1}}
    return decays.get(
        optim.kind, {"exp_avg": optim.beta1, "momentum_buffer": optim.muon_momentum} if optim.kind == "muon" else {}
    )


def _state_of(name: str) -> str:
    return name.partition(".")[0]


def _add(found: dict[str, float], name: str, values: Tensor, copies: int) -> None:
    found[name] = found.get(name, 0.0) + float(values.double().square().sum()) / copies


def _norms(ranks: list[Mapping[str, Mapping[str, float]]], clipped_by: float) -> dict[str, dict[str, Any]]:
    totals: dict[str, dict[str, float]] = {}
    for rank in ranks:
        for layer, squares in rank.items():
            total = totals.setdefault(layer, {})
            for name, square in squares.items():
                total[name] = total.get(name, 0.0) + square
    norms = {}
    for layer, total in sorted(totals.items()):
        weight = math.sqrt(total["weight"])
        norms[layer] = {"weight": weight} | ({"update_ratio": math.sqrt(total["update"]) / weight} if weight else {})
        if "gradient" in total:
            norms[layer]["gradient"] = math.sqrt(total["gradient"]) / clipped_by
    return norms
