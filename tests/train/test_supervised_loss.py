"""Fine-tuning rows: packed or padded, on every engine and layout, the loss and the gradients are those of one row at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from toy import make_engine

from megagpt.config import validate
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.data.dataset import TokenDataset
from megagpt.data.loader import step_batches
from megagpt.data.state import TrainState
from megagpt.distributed.world import World
from megagpt.documents import IGNORE
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig, ScheduleConfig
from megagpt.model.gpt import GPT, ModelConfig, initialise

SEQ_LEN, SAMPLES = 96, 7
MODELS = {
    family: ModelConfig(family=family, vocab_size=259, seq_len=SEQ_LEN, num_layers=2, num_heads=2, hidden_size=32)
    for family in ("llama", "gpt2")
}  # fmt: skip
CLASSES = ("bad", "fair", "good")
MODELS |= {f"{family}_classes": config.model_copy(update={"classes": CLASSES}) for family, config in MODELS.items()}
PLAIN_SGD = OptimConfig(
    kind="sgd", lr=1.0, beta1=0.0, weight_decay=0.0, max_grad_norm=0.0, schedule=ScheduleConfig(kind="constant")
)
"""An update with it subtracts the gradient."""
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows, packed and padded."""
    root, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    rows = [{"prompt": "p" * int(rng.integers(1, 20)), "completion": "c" * int(rng.integers(1, 20))} for _ in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for padding in ("packed", "padded"):
        supervised = {"format": "prompt_completion", "padding": padding}
        values = {"pack_seq_len": SEQ_LEN, "validation_fraction": 0, "overlap_threshold": None, "supervised": supervised}
        config = validate(TokenizeConfig, values, source="test")
        pack_documents([root / "rows.jsonl"], root / padding, "bytes", config, Execution(num_workers=1, executor="inline"))
    texts = [{"text": "t" * int(rng.integers(1, 40)), "label": str(rng.choice(CLASSES))} for _ in range(40)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for padding in ("packed", "padded"):
        supervised = {"format": "text_label", "template": "plain", "classes": CLASSES, "padding": padding}
        values = {"pack_seq_len": SEQ_LEN, "validation_fraction": 0, "overlap_threshold": None, "supervised": supervised}
        config, folder = validate(TokenizeConfig, values, source="test"), root / f"{padding}_classes"
        pack_documents([root / "texts.jsonl"], folder, "bytes", config, Execution(num_workers=1, executor="inline"))
    return {folder.name: folder for folder in root.iterdir() if folder.is_dir()}


def row_by_row(model_config: ModelConfig, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss per target and its gradients over the first SAMPLES samples, one unpadded row after the other, in fp64."""
    model = GPT(model_config)
    initialise(model, seed=1)
    model.double()
    nats, targets = torch.zeros((), dtype=torch.float64), 0
    data = TokenDataset(folder / "train", seq_len=SEQ_LEN, shuffle_block=1)
    for sample in (data.sample(i) for i in range(SAMPLES)):
        for start, length in zip(np.cumsum(sample.doc_lengths) - sample.doc_lengths, sample.doc_lengths, strict=True):
            last = int(np.flatnonzero(sample.targets[start : start + length] != IGNORE)[-1]) + 1
            ids, wanted = (torch.from_numpy(x[start : start + last]) for x in (sample.inputs, sample.targets))
            log_p = model(ids[None])[0].log_softmax(dim=-1)
            nats = nats + torch.nn.functional.nll_loss(log_p, wanted, ignore_index=IGNORE, reduction="sum")
            targets += int((wanted != IGNORE).sum())
    (nats / targets).backward()
    return (nats / targets).item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def engine_steps(world: World, cases: list[tuple[str, str, str, int, str]]) -> list[tuple[float, list[Any]]]:
    """Of each (engine, family, folder, micro-batch size, padding): the loss of one step and what it subtracted."""
    results = []
    for name, family, folder, micro_batch_size, padding in cases:
        engine = make_engine(world, name, PLAIN_SGD, model=MODELS[family], micro_batch_size=micro_batch_size)
        draw_weights(engine, MODELS[family], seed=1)
        before = {key: p.data.clone() for key, p in engine.state().items()}
        batches = step_batches(
            TokenDataset(Path(folder) / "train", seq_len=SEQ_LEN, shuffle_block=1), TrainState(), global_batch_size=SAMPLES,
            micro_batch_size=micro_batch_size, rank=world.rank, size=world.size, document_mask=padding == "packed",
        )  # fmt: skip
        (num_targets,), loss = world.sum([batches.num_targets]), torch.zeros(())
        for i, batch in enumerate(batches.micro_batches):
            micro_loss = engine.model(batch.ids, batch.targets, batch.doc_lengths) / num_targets
            engine.backward(micro_loss, last=i == len(batches.micro_batches) - 1)
            loss += micro_loss.detach()
        engine.step(1.0, 0.0)
        torch.distributed.all_reduce(loss)
        mine = [
            (key.removeprefix("param."), p.start, (before[key] - p.data).numpy())
            for key, p in engine.state().items()
            if key.startswith("param.")
        ]
        results.append((float(loss), [part for parts in world.gather(mine) for part in parts]))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_loss_and_gradients_are_those_of_one_row_at_a_time(size: int, folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [(name, "llama", str(folders["packed"]), 3, "packed") for name in ENGINES]
    cases += [("fsdp", "gpt2", str(folders["packed"]), 2, "packed"), ("zero1", "gpt2", str(folders["packed"]), 7, "packed")]
    cases += [("fsdp", "llama", str(folders["padded"]), 1, "padded"), ("zero2", "gpt2", str(folders["padded"]), 3, "padded")]
    cases += [(name, "llama_classes", str(folders["packed_classes"]), 3, "packed") for name in ENGINES]
    cases += [("zero2", "gpt2_classes", str(folders["packed_classes"]), 2, "packed")]
    cases += [("zero1", "llama_classes", str(folders["padded_classes"]), 1, "padded")]
    cases += [("fsdp", "gpt2_classes", str(folders["padded_classes"]), 3, "padded")]
    expected = {key: row_by_row(MODELS[key[0]], Path(key[1])) for key in {(case[1], case[2]) for case in cases}}
    for case, (loss, parts) in zip(cases, run_ranks(engine_steps, size, tmp_path, cases)[0], strict=True):
        wanted_loss, wanted = expected[case[1], case[2]]
        assert loss == pytest.approx(wanted_loss, abs=2e-6), case  # fp32 sums of losses of about 6 nats
        seen = set()
        for name, start, found in parts:
            gradient = wanted[name].flatten()[start : start + len(found)].numpy()
            # weights of order 0.1 to 1 minus a gradient, in fp32: each difference is right to 6e-8 of the weight
            assert np.abs(found - gradient).max() < 1e-6, (case, name)
            seen.add(name)
        assert seen == set(wanted), case
