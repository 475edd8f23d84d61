"""What an imported model is good for: evaluation, generation, and as the start of another run, but not as a run to resume."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from random_models import random_model, save_source
from small_run import losses, settings, start, write_shards

from megagpt.command import EXIT_DONE
from megagpt.config import UserError, validate
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.data.dataset import TokenDataset
from megagpt.data.loader import eval_batches
from megagpt.data.open_data import open_data
from megagpt.engine.optim import lr_at
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run
from megagpt.train.config import TrainConfig
from megagpt.train.preflight import check_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers, and the run directory that was made of it."""
    folder = tmp_path_factory.mktemp("imported")
    model = random_model("llama")
    save_source(model, folder / "source")
    import_model(ImportConfig(source=folder / "source", run_dir=folder / "run"))
    return model, folder / "run"


def continued(shards: Path, run_dir: Path, imported: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run that starts from it, with the section that the import wrote."""
    values = settings(shards, run_dir, max_steps=3, **changes)
    return {**values, **yaml.safe_load((imported / "model.yaml").read_text())}


def losses_of(model: Any, steps: list[list[Any]], config: TrainConfig) -> list[float]:
    """transformers' mean losses per token of the first steps, trained by torch's AdamW as the run is."""
    optim = config.optim
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw, found = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps), []
    for step, samples in enumerate(steps):
        ids = torch.tensor([sample.inputs.tolist() for sample in samples])
        targets = torch.tensor([sample.targets.tolist() for sample in samples])
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = lr_at(optim, step, config.max_steps)
        adamw.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"zero_stage": 1}, {"zero_stage": 3}, {"kind": "fsdp"}], ids=str)
def test_continued_pretraining_begins_with_transformers_losses(
    imported: tuple[Any, Path], shards: Path, project: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    model, run_dir = imported
    values = continued(shards, tmp_path / "run", run_dir, engine=engine, init_from=str(run_dir))
    ranks = start(project, tmp_path, values, 2)
    assert ranks.wait() == [EXIT_DONE, EXIT_DONE], ranks.output()
    config = validate(TrainConfig, values, source="")
    train = open_data(config.data).train
    steps = [[train.sample(8 * step + i) for i in range(8)] for step in range(config.max_steps)]
    expected, found = losses_of(deepcopy(model), steps, config), losses(tmp_path / "run")
    assert list(found) == [1, 2, 3]
    assert found[1] == pytest.approx(expected[0], rel=1e-6)  # fp32, summed in another order
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    assert expected[0] > expected[1] > expected[2]


def test_an_imported_model_is_no_run_to_resume(imported: tuple[Any, Path], shards: Path, tmp_path: Path) -> None:
    _, run_dir = imported
    config = validate(TrainConfig, continued(shards, run_dir, run_dir), source="")
    with pytest.raises(UserError, match=rf"is an imported model and no run to resume: start from it with init_from={run_dir}"):
        check_run(config, open_data(config.data))
    assert sorted(path.name for path in run_dir.iterdir()) == ["checked.json", "checkpoints", "model.yaml", "tokenizer"]


def test_an_imported_model_is_evaluated_on_named_shards(imported: tuple[Any, Path], shards: Path) -> None:
    model, run_dir = imported
    with pytest.raises(UserError, match="an imported model has no data of its own; name shards="):
        evaluate_run(EvaluateConfig(run_dir=run_dir))
    result = evaluate_run(EvaluateConfig(run_dir=run_dir, shards={"toy": shards / "validation"}, device="cpu"))
    dataset, nats, tokens = TokenDataset(shards / "validation", seq_len=64), 0.0, 0
    for batch in eval_batches(dataset, micro_batch_size=8, rank=0, size=1):
        with torch.no_grad():
            logits = model(batch.ids).logits.flatten(0, 1)
        nats += float(F.cross_entropy(logits, batch.targets.flatten(), reduction="sum"))
        tokens += batch.num_targets
    assert (result.total.tokens, result.total.loss) == (tokens, pytest.approx(nats / tokens, rel=1e-6))
