"""Learning rates at known steps, and which parameters are decayed by what."""

import math

import pytest
import torch

from megagpt.config import UserError, validate
from megagpt.engine.build import refuse_unsupported
from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.engine.optim import (
    STATES,
    OptimConfig,
    ScheduleConfig,
    Together,
    build_optimizer,
    create_states,
    lr_at,
    parameter_groups,
)
from megagpt.model.gpt import GPT, ModelConfig, initialise

MODEL = ModelConfig(family="gpt2", vocab_size=16, seq_len=8, num_layers=1, num_heads=2, hidden_size=8)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"kind": "constant"}, {0: 1.0, 99: 1.0}),
        ({"kind": "constant", "warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0}),
        (
            {"kind": "cosine", "warmup_steps": 20},
            {19: 1.0, 20: 1.0, 60: 0.55, 99: 0.1 + 0.45 * (1 + math.cos(math.pi * 79 / 80))},
        ),
        ({"kind": "linear", "min_lr_ratio": 0.0}, {0: 1.0, 50: 0.5, 99: 0.01}),
        ({"kind": "wsd", "decay_steps": 20, "min_lr_ratio": 0.0}, {0: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        ({"kind": "inverse_sqrt", "warmup_steps": 25}, {24: 1.0, 99: 0.5}),
    ],
)
def test_schedules(schedule: dict[str, object], values: dict[int, float]) -> None:
    config = OptimConfig(lr=2.0, schedule=ScheduleConfig.model_validate(schedule))
    assert {step: lr_at(config, step, 100) / 2 for step in values} == pytest.approx(values)


def test_wsd_needs_its_decay() -> None:
    with pytest.raises(UserError, match=r"decay_steps > 0"):
        validate(OptimConfig, {"schedule": {"kind": "wsd"}}, source="test")


def test_vectors_are_not_decayed() -> None:
    model = GPT(MODEL)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = GPT(MODEL)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, OptimConfig(kind="muon")), OptimConfig(kind="muon"))
    assert isinstance(optimizer, Together)
    by_kind = {kind: [names[p] for g in optimizer.param_groups if g["kind"] == kind for p in g["params"]] for kind in STATES}
    assert by_kind["muon"] == [
        n for n in names.values() if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n
    ]
    assert "embedding.weight" in by_kind["adamw"]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon", "adabelief"])
def test_states_made_before_the_first_step_change_nothing(kind: str) -> None:
    """torch makes them in the first step; a checkpoint needs them before."""
    results = []
    for early in (False, True):
        model = GPT(MODEL)
        initialise(model, seed=0)
        config = OptimConfig.model_validate({"kind": kind, "lr": 0.01})
        optimizer = build_optimizer(parameter_groups(model, config), config)
        if early:
            kinds = [(p, group["kind"]) for group in optimizer.param_groups for p in group["params"]]
            create_states(optimizer, kinds)
        for _ in range(3):
            ids = torch.arange(8)[None] % 16
            model(ids, ids.flip(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "refused"), [("adamw", ()), ("sgd", ()), ("muon", (1, 2, 3)), ("adabelief", (3,))])
def test_what_a_stage_cannot_compute_is_refused_by_name(kind: str, refused: tuple[int, ...]) -> None:
    optim = OptimConfig.model_validate({"kind": kind})
    refuse_unsupported(FSDPConfig(), optim, "bf16")
    for stage in range(4):
        engine = DeepSpeedConfig.model_validate({"zero_stage": stage})
        if stage in refused:
            with pytest.raises(UserError, match=f"optim.kind={kind} with engine.zero_stage={stage}"):
                refuse_unsupported(engine, optim, "fp32")
        else:
            refuse_unsupported(engine, optim, "fp32")
