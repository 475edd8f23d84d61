"""Tasks, the harness and generated answers in the training loop: on every engine, without moving a bit of the run."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from small_run import losses, settings, start
from toy import make_engine, train_steps

from megagpt.checkpoint.load_model import load_model
from megagpt.command import EXIT_DONE
from megagpt.config import UserError, validate
from megagpt.data.open_data import open_data
from megagpt.data.state import TrainState
from megagpt.distributed.world import Stopped, World, lone_world
from megagpt.engine.initial_weights import draw_weights
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run
from megagpt.evaluate.loss import evaluation_mode
from megagpt.evaluate.results import read_results
from megagpt.evaluate.scores_in_training import ScoreConfig, numbers_of, read_questions, score_model
from megagpt.files import read_json
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.metrics import read_metrics
from megagpt.monitor.monitor import Monitor
from megagpt.report.page import Picture
from megagpt.report.run_charts import score_cards
from megagpt.report.run_facts import read_facts
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.train.between_steps import sample
from megagpt.train.config import TrainConfig
from megagpt.train.early_stop import evaluated_losses, used_up

MODEL = ModelConfig(vocab_size=257, seq_len=64, num_layers=2, num_heads=2, hidden_size=32, dropout=0.1)
TASK = {
    "task": "theirs",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "words.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "generation_kwargs": {"until": ["b"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{context}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_target": 0,
    "doc_to_choice": ["b", "aa", " ab"],
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of `score`: a task, exercises of different lengths, a task of the harness that generates."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("sacrebleu")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [{"context": f"{'ab ' * i}a", "continuation": "b"} for i in range(1, 6)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    exercises = [{"prompt": "ba" * i, "answer": "ab 3"} for i in range(1, 6)]
    (tmp_path / "exercises.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exercises))
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(TASK))
    return {
        "every_steps": 2,
        "tasks": {"words": str(tmp_path / "words.jsonl")},
        "exercises": {"answers": str(tmp_path / "exercises.jsonl")},
        "harness": ["theirs"],
        "harness_folder": str(tmp_path),
        "answer_tokens": 8,
        "answer_stop": ["a"],
    }


def steps_with_and_without(world: World, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """Bits of everything that is trained after 4 steps with and without scores between them, and the scores."""
    questions = read_questions(ScoreConfig.model_validate(asked), seq_len=MODEL.seq_len)
    bits: list[dict[str, bytes]] = []
    scores = []
    for with_scores in (False, True):
        torch.manual_seed(5)  # dropout draws on from here: whatever draws between the steps would be seen
        engine = make_engine(world, name, model=MODEL)
        draw_weights(engine, MODEL, seed=1)
        for step in range(4):
            train_steps(engine, world, range(step, step + 1))
            if with_scores:
                with evaluation_mode(engine.module):
                    parts = (engine.model, MODEL, Bytes(), questions, world)
                    scores.append(numbers_of(score_model(*parts, micro_batch_size=2)))
        bits.append({key: part.data.detach().cpu().numpy().tobytes() for key, part in engine.state().items()})
    return {"without": bits[0], "with": bits[1], "scores": scores, "stable": scores[0] != scores[-1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero3", "fsdp"])
def test_scores_move_no_bit_and_are_the_same_on_every_rank(name: str, asked: dict[str, Any], tmp_path: Path) -> None:
    first, second = run_ranks(steps_with_and_without, 2, tmp_path / "ranks", asked, name)
    for found in (first, second):
        assert found["without"]
        assert found["with"] == found["without"]
    assert first["scores"] == second["scores"]
    assert first["scores"][0]["words"]["questions"] == 5
    assert {"exact_match", "f1", "rougeL", "bleu", "final_number"} <= set(first["scores"][0]["answers"])
    assert "exact_match" in first["scores"][0]["theirs"]
    assert first["scores"][0]["words"]["loss_of_gold"] != first["scores"][-1]["words"]["loss_of_gold"]


def scores_of(world: World, model: Any, module: torch.nn.Module, asked: dict[str, Any]) -> dict[str, dict[str, float]]:
    questions = read_questions(ScoreConfig.model_validate(asked), seq_len=MODEL.seq_len)
    with evaluation_mode(module), torch.no_grad():
        return numbers_of(score_model(model, MODEL, Bytes(), questions, world, micro_batch_size=2))


def scores_on(world: World, asked: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    engine = make_engine(world, name, model=MODEL)
    draw_weights(engine, MODEL, seed=1)
    return scores_of(world, engine.model, engine.module, asked)


@pytest.mark.slow
def test_scores_have_the_same_bits_on_every_layout(asked: dict[str, Any], tmp_path: Path) -> None:
    """Those of the plain model, from tasks, harness and exercises, on one rank and on two."""
    (tmp_path / "rolling.yaml").write_text(yaml.safe_dump({**TASK, **ROLLING}))
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump({**TASK, **CHOICES}))
    asked = {**asked, "harness": ["theirs", "rolling", "choices"]}
    model = GPT(MODEL)
    initialise(model, seed=1)
    alone = scores_of(lone_world(torch.device("cpu")), model, model, asked)
    assert {"words", "answers", "theirs", "rolling", "choices"} == set(alone)
    assert run_ranks(scores_on, 1, tmp_path / "one", asked, "fsdp") == [alone]
    for name in ("zero1", "zero3", "fsdp"):
        assert run_ranks(scores_on, 2, tmp_path / name, asked, name) == [alone, alone], name


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"zero_stage": 3}, {"kind": "fsdp"}], ids=str)
def test_a_run_with_evaluation_in_the_loop_has_the_weights_of_one_without(
    asked: dict[str, Any], shards: Path, project: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """Losses of the validation set, scores and samples of text after each step, or only at the end."""
    plain = settings(shards, tmp_path / "plain", max_steps=3, save_every_steps=3, evaluate_every_steps=0, engine=engine)
    plain["model"] = {**plain["model"], "seq_len": 64}
    often = {"evaluate_every_steps": 1, "sample_every_steps": 1, "sample_tokens": 5}
    busy = {**plain, **often, "run_dir": str(tmp_path / "busy"), "score": {**asked, "every_steps": 1}}
    for values in (plain, busy):
        ranks = start(project, tmp_path / f"{Path(values['run_dir']).name}_start", values)
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    found = read_metrics(tmp_path / "busy")
    for kind in ("evaluate", "score", "sample"):
        assert [row["step"] for row in found.of_kind(kind)] == [1, 2, 3], kind
    assert [row["step"] for row in read_metrics(tmp_path / "plain").of_kind("evaluate")] == [3]
    assert losses(tmp_path / "busy") == losses(tmp_path / "plain")
    weights = [load_model(folder, "last").model.state_dict() for folder in (tmp_path / "plain", tmp_path / "busy")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_run_with_scores_has_the_same_weights_and_keeps_them(
    asked: dict[str, Any], shards: Path, project: Path, tmp_path: Path
) -> None:
    base = {"max_steps": 4, "save_every_steps": 2, "keep_last": 3}
    plain = settings(shards, tmp_path / "plain", evaluate_every_steps=0, **base)
    plain["model"] = {**plain["model"], "seq_len": 64}
    scored = {**plain, "run_dir": str(tmp_path / "scored"), "evaluate_every_steps": 2}
    scored |= {"score": asked, "best_by": "words.bits_per_byte"}
    for values in (plain, scored):
        ranks = start(project, tmp_path / f"{Path(values['run_dir']).name}_start", values)
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    run = tmp_path / "scored"
    assert losses(run) == losses(tmp_path / "plain")
    weights = [load_model(folder, "last").model.state_dict() for folder in (tmp_path / "plain", run)]
    for name, value in weights[0].items():
        assert np.array_equal(value.numpy(), weights[1][name].numpy()), name
    rows = read_metrics(run).of_kind("score")
    assert [row["step"] for row in rows] == [2, 4]
    best = read_json(run / "checkpoints" / "best.json")
    found = {row["step"]: row["scores"]["words"]["bits_per_byte"] for row in rows}
    assert (best["metric"], best["step"], best["value"]) == (
        "words.bits_per_byte",
        min(found, key=found.__getitem__),
        min(found.values()),
    )
    last = run / "evaluations" / "step_00000004.json"
    [kept] = read_results(last)
    assert kept["tasks"]["words"]["bits_per_byte"] == found[4]
    assert kept["harness"]["theirs"]["questions"] == 5
    theirs = {name: asked[name] for name in ("tasks", "exercises", "harness", "harness_folder", "answer_tokens", "answer_stop")}
    again = evaluate_run(EvaluateConfig.model_validate({"run_dir": run, "device": "cpu", **theirs}))
    assert again.tasks["words"].accuracy == kept["tasks"]["words"]["accuracy"]
    assert again.tasks["words"].bits_per_byte == pytest.approx(found[4], rel=1e-5)
    assert again.exercises["answers"].f1 == kept["exercises"]["answers"]["f1"]
    assert again.harness["theirs"].metrics == kept["harness"]["theirs"]["metrics"]


def test_the_report_draws_shares_over_steps(tmp_path: Path) -> None:
    rows = [
        {"kind": "score", "step": step, "time": 1.0, "incarnation": 1, "scores": {"words": {"f1": value, "questions": 5}}}
        for step, value in ((0, 0.25), (4, 0.5))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [card] = score_cards(read_facts(tmp_path, {}))
    [picture] = card.blocks
    assert isinstance(picture, Picture)
    [drawn] = picture.chart.lines
    assert (card.title, drawn.label, list(drawn.x), list(drawn.y)) == ("Scores: words", "f1", [0, 4], [0.25, 0.5])


def test_each_token_of_a_sample_is_progress_and_a_place_to_stop(shards: Path, tmp_path: Path) -> None:
    config = validate(TrainConfig, settings(shards, tmp_path / "run", sample_tokens=7), source="test")
    world, model = lone_world(torch.device("cpu")), GPT(config.model)
    monitor = Monitor(config.run_dir, MonitorConfig(), run_config={}, rank=0)
    engine, data = SimpleNamespace(model=model, module=model), open_data(config.data)
    run: Any = SimpleNamespace(config=config, data=data, world=world, engine=engine, monitor=monitor)
    sample(run, TrainState(step=3))
    assert world.progress.count == 7
    world.stop.request("SIGTERM")
    with pytest.raises(Stopped):
        sample(run, TrainState(step=6))
    assert world.progress.count == 7
    monitor.close()
    assert [row["step"] for row in read_metrics(config.run_dir).of_kind("sample")] == [3]


def test_patience_goes_by_a_score(tmp_path: Path) -> None:
    rows = [
        {"kind": "score", "step": step, "time": 1.0, "incarnation": 1, "scores": {"t": {"f1": value, "bits_per_byte": value}}}
        for step, value in ((2, 0.5), (4, 0.6), (6, 0.6), (8, 0.55))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert used_up(evaluated_losses(tmp_path, "t.f1"), 2)
    assert not used_up(evaluated_losses(tmp_path, "t.f1")[:-1], 2)
    assert used_up(evaluated_losses(tmp_path, "t.bits_per_byte"), 3), "of bits the lowest is the best"
    with pytest.raises(UserError, match=r"best_by=t.f2: not among the scores"):
        evaluated_losses(tmp_path, "t.f2")


@pytest.mark.parametrize("kind", ["evaluate", "score"])
def test_patience_begins_anew_with_what_is_measured_and_at_a_planned_change(kind: str, tmp_path: Path) -> None:
    def row(step: int, value: float, **more: Any) -> dict[str, Any]:
        found = {"loss": value} if kind == "evaluate" else {"scores": {"t": {"loss_of_gold": value}}}
        return {"kind": kind, "step": step, "time": 1.0, "incarnation": 1, **found, **more}

    def counted(*rows: dict[str, Any]) -> list[float]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
        return evaluated_losses(tmp_path, "loss" if kind == "evaluate" else "t.loss_of_gold", "b")

    other = [row(2, 1.0, measured="a"), row(4, 1.1, measured="a")]
    own = [row(6, 5.0, measured="b"), row(8, 4.0, measured="b")]
    assert counted(*other, *own) == [5.0, 4.0], "losses on another set are lower, and no reason to stop"
    assert counted(row(2, 3.0), *own) == [3.0, 5.0, 4.0], "a row of an earlier version names none"
    planned = {"kind": "planned", "step": 6, "time": 1.0, "incarnation": 1, "change": "data.weight_changes: 0 -> 1"}
    assert counted(own[0], planned, own[1]) == [4.0], "the evaluation after 6 updates was before the change"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"score": {"every_steps": 2}}, "every_steps=2: tasks, harness or exercises have to be named"),
        ({"score": {"tasks": {"a": "x"}, "exercises": {"a": "y"}}}, "a: a name of tasks, harness and exercises stands for one"),
        ({"best_by": "a.accuracy"}, "best_by=a.accuracy: loss, or TASK.METRIC of a name in score.tasks"),
        ({"score": {"tasks": {"a": "x"}}, "best_by": "a.f1"}, "best_by=a.f1: loss, or one of accuracy, accuracy_per_byte"),
        ({"score": {"tasks": {"a": "x"}}, "best_by": "a.accuracy", "early_stop_evaluations": 1}, "needs score.every_steps"),
    ],
)
def test_scores_that_cannot_be_meant_are_refused(changes: dict[str, Any], match: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        validate(TrainConfig, settings(shards, tmp_path, **changes), source="test")


def test_questions_are_named_by_what_is_in_their_files(asked: dict[str, Any], tmp_path: Path) -> None:
    """The same names, in the same folder, with other questions."""

    def name() -> str:
        return read_questions(ScoreConfig.model_validate(asked), seq_len=MODEL.seq_len).digest

    whole = dict(asked)
    for kind, file in (("tasks", "words"), ("exercises", "exercises"), ("harness", "words")):
        asked.clear()
        asked |= {key: value for key, value in whole.items() if key in (kind, "harness_folder", "answer_tokens")}
        before = name()
        assert name() == before
        lines = (tmp_path / f"{file}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{file}.jsonl").write_text("".join(lines[1:]))
        assert name() != before, kind
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
        asked["max_samples"] = 2
        assert name() != before, kind


def test_questions_are_read_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"context": "a"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl: line 1: no question of a known kind"):
        read_questions(ScoreConfig(tasks={"a": tmp_path / "bad.jsonl"}), seq_len=32)
    with pytest.raises(UserError, match=r"score.exercises.a: .*gone.jsonl: No such file or directory"):
        read_questions(ScoreConfig(exercises={"a": tmp_path / "gone.jsonl"}, answer_tokens=4), seq_len=32)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "answer": "b"}' * 99)[:-20])
    with pytest.raises(UserError, match=r"score.exercises.b: .*cut.jsonl.gz: damaged"):
        read_questions(ScoreConfig(exercises={"b": tmp_path / "cut.jsonl.gz"}, answer_tokens=4), seq_len=32)
    with pytest.raises(UserError, match=r"score.answer_tokens=64 leaves no room for a prompt in seq_len=32"):
        read_questions(ScoreConfig(exercises={"a": tmp_path / "bad.jsonl"}), seq_len=32)
