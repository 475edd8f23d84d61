"""Step times: by hand, against the published runs, and hardware.yaml against the result of the fit."""

import csv
import json
from pathlib import Path

import pytest

from megagpt.model.flops import flops_per_token
from megagpt.model.gpt import ModelConfig
from megagpt.plan.hardware import Efficiency, efficiency_of, find_gpu, hardware
from megagpt.plan.speed import Workload, block_flops, step_time

PROJECT = Path(__file__).resolve().parents[2]
RESULT = json.loads((PROJECT / "bench" / "results" / "plan_time.json").read_text(encoding="utf-8"))["results"]


def test_a_step_by_hand() -> None:
    gpu = find_gpu("h100_80gb")
    assert gpu is not None
    efficiency = Efficiency(
        matmul=0.5,
        half_tokens=1000,
        attention=0.25,
        block_bytes=10,
        exposed=0.5,
        median_error=0,
        p90_error=0,
        max_gpus=1,
        rows=1,
    )
    work = Workload(
        layers=2, width=10, vocab_size=100, parameters=1000, block_products=1000.0, block_attention=500.0,
        repeated_products=1.0, repeated_elementwise=1.0, micro_batch_tokens=1000, accumulation=3, ranks=4,
        micro_batch_traffic_seconds=2.0, step_traffic_seconds=1.0,
    )  # fmt: skip
    step = step_time(work, gpu, efficiency)
    peak, bandwidth = 989e12, 3350e9
    assert step.products == pytest.approx(3000 * (2 * 1000 * 4 + 3 * 2 * 10 * 100) / (peak * 0.5 * 0.5))
    assert step.attention == pytest.approx(3000 * 2 * 250 * 4.5 / (peak * 0.25))
    assert step.elementwise == pytest.approx(3000 * (2 * 10 * 10 * 4 / 3 + 100 * 20) / bandwidth)
    assert step.communication == pytest.approx(0.5 * (3 * 2 + 1))
    assert step.update == pytest.approx(28 * 250 / bandwidth)
    assert step.total == pytest.approx(step.products + step.attention + step.elementwise + step.communication + step.update)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_block_flops_are_those_of_the_model(family: str, kv_heads: int) -> None:
    model = ModelConfig.model_validate(
        {"family": family, "vocab_size": 100, "seq_len": 64, "num_layers": 3, "num_heads": 8, "num_kv_heads": kv_heads,
         "hidden_size": 128}
    )  # fmt: skip
    products, attention = block_flops(model, 64)
    assert 3 * (3 * (products + attention) + 2 * 128 * 100) == flops_per_token(model).full


def test_hardware_holds_the_fitted_efficiencies() -> None:
    for name, values in RESULT["fitted"].items():
        gpu = hardware().gpus[name]
        assert gpu.efficiency is not None
        for key, value in values.items():
            assert getattr(gpu.efficiency, key) == pytest.approx(value, rel=1e-3), f"{name}: run bench/plan/speed.py write=true"


def test_held_back_errors_are_below_those_of_one_constant() -> None:
    for row in RESULT["rows"]:
        if row["gpu"] in ("a100_40gb", "a100_80gb", "h100_80gb"):
            assert row["median_error_pct"] < min(5, row["constant_median_error_pct"])


def test_every_calibration_row_has_a_source() -> None:
    with (PROJECT / "bench" / "plan" / "calibration.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 271
    assert all("github" in row["source"] or "http" in row["source"] for row in rows)


def test_every_gpu_and_network_has_a_source() -> None:
    table = hardware()
    assert all(gpu.source and gpu.network in table.networks for gpu in table.gpus.values())
    assert all(network.source for network in table.networks.values())
    b200 = find_gpu("b200")
    assert b200 is not None
    assert efficiency_of(b200) is None
    assert find_gpu("tpu_v9") is None
