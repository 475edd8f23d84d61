"""Losses by source of the mixture: of each source's own samples, the same on any ranks; the training's bits do not move."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_run import settings, start, write_shards
from test_late_results import weights

from megagpt.command import EXIT_DONE
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.monitor.metrics import Row, read_metrics
from megagpt.train.step import SourceLosses


def test_each_sample_counts_for_its_source() -> None:
    model = GPT(ModelConfig(vocab_size=50, seq_len=8, num_layers=1, num_heads=2, hidden_size=16, z_loss=0.1))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(0)
    losses, expected = SourceLosses(3, torch.device("cpu")), [0.0, 0.0, 0.0]
    for sources in ([0, 2, 0], [2]):
        ids, targets = (torch.randint(0, 50, (len(sources), 8), generator=generator) for _ in range(2))
        targets[0, :3] = -100
        model.train()(ids, targets)
        losses.add(model, torch.tensor(sources))
        rows = F.cross_entropy(model.eval()(ids).transpose(1, 2), targets, reduction="none").sum(1)
        for source, row in zip(sources, rows.tolist(), strict=True):
            expected[source] += row
    assert losses.sums[0].tolist() == pytest.approx(expected, rel=1e-6)
    nothing = SourceLosses(0, torch.device("cpu"))
    nothing.add(model, None)
    assert nothing.sums == []


def run(project: Path, folder: Path, sources: dict[str, Any], size: int, log_every_steps: int) -> tuple[list[Row], bytes]:
    """The train rows, and all of the last checkpoint's weights and states."""
    values = settings(Path("none"), folder / "run", max_steps=3, engine={"kind": "fsdp"}, evaluate_every_steps=0)
    values |= {"monitor": {"log_every_steps": log_every_steps}, "save_every_steps": 100, "read_results": "late"}
    ranks = start(project, folder, values | {"data": {**values["data"], "sources": sources}}, size)
    assert ranks.wait() == [EXIT_DONE] * size, ranks.output()
    return read_metrics(folder / "run").of_kind("train"), weights(folder / "run")


@pytest.mark.slow
def test_a_run_logs_them_on_any_ranks_and_trains_as_without(project: Path, tmp_path: Path) -> None:
    sources = {
        name: {"path": str(write_shards(tmp_path / name, letters, seed)), "weight": weight}
        for seed, (name, letters, weight) in enumerate((("plain", ("a",), 1), ("mixed", ("ab", "ba", " "), 3)))
    }
    rows, _ = run(project, tmp_path / "two", sources, 2, 1)
    alone, trained = run(project, tmp_path / "one", sources, 1, 1)
    _, trained_without = run(project, tmp_path / "without", sources, 1, 100)
    assert trained == trained_without, "summing moves no bit"
    for row, other in zip(rows, alone, strict=True):
        found = row["sources"]
        assert {name: score["targets"] for name, score in found.items()} == {"plain": 64, "mixed": 192}
        whole = sum(score["loss"] * score["targets"] for score in found.values()) / 256
        assert whole == pytest.approx(row["loss"], rel=1e-6)  # the losses of micro-batches are fp32 sums
        for name, score in found.items():
            assert score["loss"] == pytest.approx(other["sources"][name]["loss"], rel=1e-6)
    assert rows[0]["sources"]["plain"] != rows[0]["sources"]["mixed"]
    assert len(rows) == 3
