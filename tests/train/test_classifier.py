"""A classifier from a language model's weights, as a user trains it: its scores, checkpoints, and who refuses it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import losses, settings, start, write_shards

from megagpt.checkpoint.admin import merge
from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.partitions import index_of
from megagpt.checkpoint.save_load import list_checkpoints, read_state
from megagpt.command import EXIT_DONE
from megagpt.config import UserError, validate
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import open_data
from megagpt.documents import IGNORE
from megagpt.engine.build import whole_shapes
from megagpt.evaluate.evaluate_model import EvaluateConfig, describe, evaluate_run
from megagpt.files import read_json
from megagpt.generate.generate_text import GenerateConfig, generate_run
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.model.tune import TuneConfig
from megagpt.monitor.metrics import read_metrics
from megagpt.train.config import TrainConfig
from megagpt.train.early_stop import evaluated_losses
from megagpt.train.preflight import check_initial, check_run

SEQ_LEN, CLASSES = 32, ("few", "many", "none")
CLASSIFIER = ModelConfig(vocab_size=64, seq_len=SEQ_LEN, num_layers=2, num_heads=2, hidden_size=32, classes=CLASSES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of a and b, by how many a there are."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    texts = ["".join(rng.choice(["a", "b"], int(rng.integers(1, 12)), p=[0.3, 0.7])) for _ in range(120)]
    lines = [{"text": text, "label": ("none", "few", "many")[min(2, text.count("a"))]} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    supervised = {"format": "text_label", "template": "plain", "classes": CLASSES}
    values = {"pack_seq_len": SEQ_LEN, "validation_fraction": 0.3, "overlap_threshold": None, "supervised": supervised}
    config = validate(TokenizeConfig, values, source="test")
    pack_documents([folder / "rows.jsonl"], folder / "shards", "bytes", config, Execution(num_workers=1, executor="inline"))
    return folder / "shards"


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A language model to begin with."""
    folder = tmp_path_factory.mktemp("base")
    values = settings(write_shards(folder / "shards"), folder / "run", max_steps=2, engine={"kind": "fsdp"})
    assert start(project, folder, values, 1).wait() == [EXIT_DONE]
    return folder / "run"


def classifier(rows: Path, run_dir: Path, base: Path, **changes: Any) -> dict[str, Any]:
    values = settings(rows, run_dir, global_batch_size=4, init_from=str(base), evaluate_every_steps=2, save_every_steps=2)
    values["optim"] = {"lr": 5e-3, "schedule": {"kind": "constant"}}
    values["model"] |= {"classes": list(CLASSES)}
    values["data"] |= {"shuffle_block": 1, "document_mask": True}
    return values | changes


def predictions(run_dir: Path, split: Path, step: Any = "last") -> tuple[list[int], list[int], float]:
    """(right classes, predicted ones, mean loss) of one unpadded text after the other."""
    model, data = load_model(run_dir, step, classifier=True).model.double(), TokenDataset(split, seq_len=SEQ_LEN)
    right, predicted, nats = [], [], 0.0
    for sample in (data.window(i) for i in range(data.num_windows())):
        for first, length in zip(np.cumsum(sample.doc_lengths) - sample.doc_lengths, sample.doc_lengths, strict=True):
            [place] = np.flatnonzero(sample.targets[first : first + length] != IGNORE)
            with torch.no_grad():
                logits = model(torch.from_numpy(sample.inputs[None, first : first + place + 1]))[0, -1]
            right.append(int(sample.targets[first + place]))
            predicted.append(int(logits.argmax()))
            nats -= float(logits.log_softmax(dim=-1)[right[-1]])
    return right, predicted, nats / len(right)


@pytest.mark.slow
def test_a_classifier_is_trained_scored_saved_and_resumed(base_run: Path, rows: Path, project: Path, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    run_dir = tmp_path / "run"
    values = classifier(rows, run_dir, base_run, max_steps=18, engine={"zero_stage": 2}, best_by="classes.macro_f1")
    values |= {"evaluate_every_steps": 6, "save_every_steps": 6}
    first = start(project, tmp_path, values, 2, "max_steps=6")
    assert first.wait() == [EXIT_DONE] * 2, first.output()
    other = start(project, tmp_path, values, 1, "engine.kind=fsdp")
    assert other.wait() == [EXIT_DONE], other.output()
    assert "resumed True" in other.output()
    metrics, curve = read_metrics(run_dir), losses(run_dir)
    assert np.mean([curve[step] for step in range(14, 19)]) < 0.9 * curve[1]
    assert {row["step"] for row in metrics.of_kind("evaluate")} == {6, 12, 18}
    row = metrics.of_kind("evaluate")[-1]
    right, predicted, loss = predictions(run_dir, rows / "validation")
    assert row["loss"] == pytest.approx(loss, abs=1e-5)
    assert row["tokens"] == len(right)
    assert row["bits_per_byte"] is None
    assert row["scores"]["classes"]["accuracy"] == row["accuracy"] == accuracy_score(right, predicted)
    expected = precision_recall_fscore_support(right, predicted, labels=[0, 1, 2], zero_division=0)
    for i, name in enumerate(CLASSES):
        assert [*row["scores"][f"classes.{name}"].values()] == [values[i] for values in expected]
    best = read_json(run_dir / "checkpoints" / "best.json")
    scores = [row["scores"]["classes"]["macro_f1"] for row in metrics.of_kind("evaluate")]
    assert (best["metric"], best["value"]) == ("classes.macro_f1", max(scores))
    since = [-score for score in scores[1:]]  # another max_steps is a planned change, from which on evaluations count
    assert evaluated_losses(run_dir, "classes.macro_f1") == since
    # evaluated again by the tool
    found = evaluate_run(EvaluateConfig(run_dir=run_dir))
    assert found.total is not None
    assert found.total.class_scores() == metrics.of_kind("evaluate")[-1]["scores"]
    assert "  classes.many         precision 0." in describe(found)
    with pytest.raises(UserError, match="has no classes, its targets are tokens"):
        evaluate_run(EvaluateConfig(run_dir=run_dir, shards={"a": base_run.parent / "shards" / "validation"}))
    with pytest.raises(UserError, match="which gives no text"):
        evaluate_run(EvaluateConfig(run_dir=run_dir, tasks={"a": write_task(tmp_path)}))
    with pytest.raises(UserError, match="which gives no text"):
        generate_run(GenerateConfig(run_dir=run_dir, prompt="a"))
    for export, message in (
        ({"format": "onnx"}, "which gives no text: format=onnx is for language models"),
        ({"adapter_only": True}, r"has no adapters \(tune\.lora\)"),
    ):
        with pytest.raises(UserError, match=message):
            export_model(ExportConfig.model_validate({"run_dir": run_dir, "output_dir": tmp_path / "x", **export}))

    # weights and data that do not fit
    def begin(base: Path, **model: Any) -> None:
        config = validate(TrainConfig, {**values, "model": {**values["model"], **model}}, source="test")
        data, path = open_data(config.data), list_checkpoints(base)[-1]
        check_initial(config, data, read_state(path), path)
        check_run(config, data)

    with pytest.raises(UserError, match=r"of another model: blocks.0.attention.key.weight: "):
        begin(base_run, hidden_size=64)
    with pytest.raises(UserError, match=r"model.classes=\['a', 'b'\]: .* has \['few', 'many', 'none'\]"):
        begin(base_run, classes=["a", "b"])
    with pytest.raises(
        UserError, match=r"a classifier of \['few', 'many', 'none'\], and model.classes=\['many', 'few', 'none'\]"
    ):
        begin(run_dir, classes=["many", "few", "none"])
    begin(run_dir)


def write_task(folder: Path) -> Path:
    (folder / "task.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    return folder / "task.jsonl"


@pytest.mark.slow
def test_adapters_and_the_last_layer_are_saved_alone_and_resume_exactly(
    base_run: Path, rows: Path, project: Path, tmp_path: Path
) -> None:
    tune = {"lora": {"rank": 2, "dropout": 0.1}}
    for name, words in (("whole", ("max_steps=6",)), ("cut", ("max_steps=4",)), ("cut", ("max_steps=6",))):
        values = classifier(rows, tmp_path / name, base_run, tune=tune, engine={"kind": "fsdp"}, determinism="strict")
        run = start(project, tmp_path / name, values, 1, *words)
        assert run.wait() == [EXIT_DONE], run.output()
    one, two = (load_model(tmp_path / name, classifier=True).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    kept = {key for key in index_of(list_checkpoints(tmp_path / "cut")[-1]) if key.startswith("param.")}
    assert len(kept) == 2 * 2 * 2 + 1
    assert "param.score.weight" in kept
    base = load_model(base_run).model.state_dict()
    assert torch.equal(base["blocks.1.mlp.up.weight"], one["blocks.1.mlp.up.weight"])
    merge(tmp_path / "cut", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", classifier=True).model.state_dict()
    assert all(torch.equal(one[name], merged[name]) for name in one)
    assert predictions(tmp_path / "cut", rows / "validation")[2] == pytest.approx(
        read_metrics(tmp_path / "cut").of_kind("evaluate")[-1]["loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("tune", "trained"),
    [
        ({"freeze": ["*"]}, {"score.weight"}),
        ({"freeze_blocks": 2}, {"norm.weight", "score.weight"}),
        ({"lora": {"targets": ["mlp.out"]}}, {f"blocks.{i}.mlp.out.lora_{x}" for i in (0, 1) for x in "ab"} | {"score.weight"}),
    ],
)
def test_the_last_layer_is_always_trained(tune: dict[str, Any], trained: set[str]) -> None:
    assert {*whole_shapes(CLASSIFIER, TuneConfig.model_validate(tune), trained_only=True)} == trained


def test_a_classifier_counts_its_predictions_and_has_no_vocabulary_to_score() -> None:
    model, generator = GPT(CLASSIFIER).eval(), torch.Generator().manual_seed(0)
    assert {name for name, _ in model.named_parameters()} == {n for n in whole_shapes(CLASSIFIER) if not n.startswith("head")}
    assert model.score.weight.shape == (3, 32)
    ids = torch.randint(0, 64, (4, SEQ_LEN), generator=generator)
    targets = torch.full((4, SEQ_LEN), IGNORE)
    targets[torch.arange(4), torch.tensor([3, 31, 0, 7])] = torch.tensor([0, 2, 2, 1])
    with torch.no_grad():
        logits, total = model(ids), model(ids, targets)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=0)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for row, place in enumerate((3, 31, 0, 7)):
        counts[targets[row, place], logits[row, place].argmax()] += 1
    terms = model.loss_terms()
    assert torch.equal(terms["confusion"], counts)
    assert terms["hits"] == counts.diagonal().sum()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sample_every_steps": 1}, "sample_every_steps=1 with model.classes: a classifier gives no text; set it to 0"),
        ({"score": {"tasks": {"a": "a.jsonl"}}}, "score with model.classes"),
        ({"best_by": "classes.f1"}, "best_by=classes.f1: loss, or one of classes.accuracy, .* is expected"),
        ({"best_by": "classes.few.f1", "evaluate_every_steps": 0, "early_stop_evaluations": 1}, "needs evaluate_every_steps"),
        ({"model": {**CLASSIFIER.model_dump(), "classes": ["a"]}}, "at least two different names"),
    ],
)
def test_settings_of_a_classifier_that_do_not_fit(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        validate(TrainConfig, classifier(tmp_path, tmp_path, tmp_path, **changes), source="test")
