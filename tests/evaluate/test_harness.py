"""lm-eval's tasks on our own model: what the adapter answers against slow versions, our own tasks, and bad input."""

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from test_evaluate_model import TEXTS, slow_likelihood, small_gpt, write_run, write_source

from megagpt.command import EXIT_USER_ERROR, run_words
from megagpt.distributed.world import Stopped, World, lone_world
from megagpt.evaluate.evaluate_model import EvaluateConfig, Evaluation, evaluate_run
from megagpt.evaluate.harness import ask_tasks, load_tasks, open_adapter
from megagpt.evaluate.results import read_results
from megagpt.tokenizer.plain_bytes import Bytes

pytest.importorskip("lm_eval")

CHOICES = [
    {"query": "Question: Who runs?\n", "choices": ["the fox", "a stone", "é"], "gold": 0},
    {"query": "Question: Where?\n", "choices": ["up", "down there"], "gold": 1},
    {"query": "Question: Why?\n", "choices": ["because", "so"], "gold": 1},
]
LAST_WORDS = [{"context": "The quick brown", "continuation": "fox"}, {"context": "jumps", "continuation": "over"}]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.rstrip()}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}} is what is read, and it is longer than the model is.",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "text": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "sampled": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": True},
        "metric_list": [{"metric": "exact_match"}],
    },
    "no_data": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{a}}",
        "doc_to_target": "{{b}}",
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run, and beside it task files with their data."""
    folder = tmp_path_factory.mktemp("harness")
    source = write_source(folder / "toy", Bytes(), TEXTS)
    write_run(folder / "run", source, small_gpt(vocab_size=257))
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, rows in (("choices", CHOICES), ("words", LAST_WORDS)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        file = {"choices": "choices.jsonl", "no_data": "absent.jsonl"}.get(name, "words.jsonl")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test"}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    (folder / "exercise.jsonl").write_text('{"prompt": "fox", "answer": "x"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def evaluated(world: World, folder: Path, run: str, names: tuple[str, ...]) -> Evaluation:
    config = EvaluateConfig(
        run_dir=folder / run,
        harness=names,
        harness_folder=folder / "tasks",
        tasks={"own": folder / "tasks" / "choices.jsonl", "own_words": folder / "tasks" / "words.jsonl"},
        exercises={"exercise": folder / "exercise.jsonl"},
        answer_tokens=4,
        device="cpu",
        micro_batch_size=2,
    )
    return evaluate_run(config, world)


@pytest.mark.slow
def test_the_harness_scores_as_our_own_tasks_do_on_one_and_two_ranks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("choices", "words", "rolling", "text")
    started: list[Any] = []

    def refuse(*words: Any, **_: Any) -> None:
        started.append(words)
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        alone = evaluated(lone_world(torch.device("cpu")), folder, "run", names)
    assert not started, "lm-eval describes the machine by pip and git"
    ours, found = alone.tasks["own"], alone.harness["choices"]
    assert found.questions == 3
    assert found.metrics == {
        "acc": ours.accuracy,
        "acc_norm": ours.accuracy_per_character,
        "acc_bytes": ours.accuracy_per_byte,
    }
    assert found.standard_errors["acc"] == pytest.approx(ours.standard_error)
    words = alone.harness["words"]
    assert words.metrics["acc"] == alone.tasks["own_words"].accuracy
    assert words.metrics["perplexity"] == pytest.approx(math.exp(alone.tasks["own_words"].loss_of_gold))
    assert words.standard_errors["perplexity"] is not None

    model, nats, size = small_gpt(vocab_size=257).eval(), 0.0, 0
    for row in LAST_WORDS:
        text = f"{row['context']} is what is read, and it is longer than the model is.".encode()
        ids, size = [256, *text], size + len(text)
        for start in range(0, len(text), 32):  # windows of 32 targets; the last one sees as much as fits before it
            window = ids[start + 1 : start + 33]
            context = ids[start : start + 1] if start + 32 <= len(text) else ids[len(ids) - 33 : start + 1]
            nats += slow_likelihood(model, context, window)[0]
    assert alone.harness["rolling"].metrics["bits_per_byte"] == pytest.approx(-nats / math.log(2) / size, rel=1e-5)
    assert alone.harness["text"].metrics == {"exact_match": 0.0}
    [kept] = read_results(alone.path)
    assert kept["harness"]["choices"]["metrics"]["acc"] == ours.accuracy
    assert kept["exercises"]["exercise"]["answers"] == 1
    assert list(alone.path.parent.glob("[!.]*")) == [alone.path]  # nothing unfinished is left

    first, second = run_ranks(evaluated, 2, tmp_path, folder, "run", names)
    assert first == second == alone
    assert len(read_results(alone.path)) == 1
    loaded, world = load_tasks(names, folder / "tasks"), lone_world(torch.device("cpu"))
    world.stop.request("SIGTERM")
    adapter = open_adapter(model, model.config, Bytes(), micro_batch_size=2, world=world)
    with pytest.raises(Stopped):
        ask_tasks(adapter, loaded, world)
    assert not any(hasattr(task, "_instances") for task in loaded.found["tasks"].values()), (
        "prompts were made after the request"
    )
    evaluated(lone_world(torch.device("cpu")), folder, "run", ("choices",))
    assert len(read_results(alone.path)) == 2, "other tasks of the harness are another measurement"


@pytest.mark.slow
def test_whatever_differs_in_a_task_of_the_same_name_is_a_result_of_its_own(folder: Path, tmp_path: Path) -> None:
    tasks = shutil.copytree(folder / "tasks", tmp_path / "tasks")
    run_dir = shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))

    def num_results(**changes: Any) -> int:
        values = {"harness": ["words"], "harness_folder": tasks, "device": "cpu", "max_samples": 2, **changes}
        return len(read_results(evaluate_run(EvaluateConfig.model_validate({"run_dir": run_dir, **values})).path))

    assert [num_results(), num_results()] == [1, 1]
    assert num_results(max_samples=1) == 2
    assert num_results(harness_num_fewshot=1) == 3
    (tasks / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(LAST_WORDS)))
    assert num_results() == 4, "other questions"
    settings = yaml.safe_load((tasks / "words.yaml").read_text())
    (tasks / "words.yaml").write_text(yaml.safe_dump({**settings, "doc_to_text": "So: {{context}}"}))
    assert [num_results(), num_results()] == [5, 5], "another prompt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harness": "[sampled]"}, "generation_kwargs.do_sample=True of a task: answers are greedy"),
        ({"harness": "[no_data]"}, "absent.jsonl"),
        ({"harness_folder": "no/such"}, "harness_folder=no/such: no such folder"),
        ({"exercises.x": "no/such.jsonl"}, "no/such.jsonl"),
    ],
)
def test_mistakes_are_one_clear_error(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    import evaluate_model

    values = {"run_dir": folder / "run", "harness": "[words]", "harness_folder": folder / "tasks", "device": "cpu", **changes}
    words = [f"{key}={value}" for key, value in values.items()]
    assert run_words(EvaluateConfig, evaluate_model.run, "", words) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err
