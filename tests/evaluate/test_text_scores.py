"""Scores of generated answers by hand; files of exercises; answers that end where they should."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate_model import small_gpt

from megagpt.config import UserError
from megagpt.distributed.world import Stopped, lone_world
from megagpt.evaluate.generated_answers import AnswerRequest, Exercise, cut_at, generate_answers, read_exercises
from megagpt.evaluate.text_scores import exact_match, final_number, score_texts, token_f1
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.tokenizer.plain_bytes import Bytes

WORLD = lone_world(torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "answer", "exact", "f1"),
    [
        ("The cat!", "cat", 1.0, 1.0),
        ("a black cat", "the white cat", 0.0, 0.5),  # black cat, white cat: one of two words each
        ("cat cat dog", "cat", 0.0, 0.5),  # precision 1/3, recall 1
        ("dog", "cat", 0.0, 0.0),
        ("the", "", 1.0, 1.0),  # without articles both are empty
        ("cat", "", 0.0, 0.0),
        ("Straße", "straße", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_by_hand(text: str, answer: str, exact: float, f1: float) -> None:
    assert exact_match(text, answer) == exact
    assert token_f1(text, answer) == pytest.approx(f1)


def test_the_best_right_answer_counts_and_the_scores_are_those_of_the_libraries() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    generated = ["the black cat sat on the mat", "a dog"]
    right = [["a white cat sat on the mat", "nothing"], ["dog"]]
    found = score_texts(generated, right)
    assert (found.answers, found.exact_match, found.f1) == (2, 0.5, pytest.approx((0.8 + 1.0) / 2))  # 4 words of 5
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    theirs = [RougeScorer(kinds).score(answers[0], text) for answers, text in zip(right, generated, strict=True)]
    for kind in kinds:
        assert getattr(found, kind) == pytest.approx(sum(score[kind].fmeasure for score in theirs) / 2), kind
    assert found.bleu == sacrebleu.corpus_bleu(generated, [["a white cat sat on the mat", "dog"], ["nothing", None]]).score
    assert "tok:13a" in found.bleu_signature
    assert found.standard_errors["exact_match"] == pytest.approx(0.5)
    assert score_texts(["кошка спит", "猫が好き"], [["кошка"], ["猫"]]).rouge1 == pytest.approx((2 / 3 + 2 / 5) / 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 and 3 make 5.\n#### 5", "5"),
        ("so it costs $1,234.50, nothing more", "1234.50"),
        ("from 7 to -3", "-3"),
        ("#### 12 apples, not 13", "12"),
        ("none ####", None),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_final_numbers_are_counted_where_a_right_answer_has_one() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    found = score_texts(["it is 1,000", "5.0", "x", "7"], [["#### 1000"], ["5"], ["4"], ["no number"]])
    assert found.final_number == pytest.approx(2 / 3)
    assert score_texts(["7"], [["a"]]).final_number is None


def test_exercises_are_read(tmp_path: Path) -> None:
    path = tmp_path / "exercises.jsonl"
    path.write_text('{"prompt": "2+2=", "answer": "4"}\n{"prompt": "", "answers": ["a", "b"]}\n')
    assert read_exercises(path) == [Exercise("2+2=", ("4",)), Exercise("", ("a", "b"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p"}\n', "line 1: prompt, and answer or answers"),
        ('{"prompt": "p", "answer": "a"}\n{"prompt": 3, "answer": "a"}\n', "line 2: prompt is a text"),
        ('{"prompt": "p", "answers": []}\n', "at least one text"),
        ("[]\n", "line 1"),
        ("", "holds no prompts"),
    ],
)
def test_what_is_no_exercise_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "exercises.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_exercises(path)


def test_answers_are_the_greedy_ones_and_end_before_the_stop_text() -> None:
    model, tokenizer = small_gpt().eval(), Bytes()
    prompts = ["ab", "cd", "xyz", "a much longer prompt than fits in thirty-two tokens"]

    def greedy(prompt: str, count: int) -> str:
        ids = torch.tensor([list(prompt.encode())[-(32 - count) :]])
        sampling = SamplingConfig(max_tokens=count, temperature=0.0)
        new = [step[0] for step in generate_ids(model, model.config, ids, sampling, vocab_size=257, eos_ids=(256,))]
        return tokenizer.decode([token for token in new if token is not None])

    options = {"micro_batch_size": 2, "world": WORLD}
    parts = (model, model.config, tokenizer)
    found = generate_answers(*parts, [AnswerRequest(prompt, (), 8) for prompt in prompts], **options)
    assert found == [greedy(prompt, 8) for prompt in prompts]
    stop = found[0][3]
    [cut] = generate_answers(*parts, [AnswerRequest(prompts[0], ("\x00none", stop), 8)], **options)
    assert cut == found[0][: found[0].index(stop)]
    with pytest.raises(UserError, match="32 tokens of an answer and a prompt are more than seq_len=32"):
        generate_answers(*parts, [AnswerRequest("p", (), 32)], **options)


def test_answers_in_a_training_loop_get_on_with_each_token_and_stop_after_the_one_that_is_made() -> None:
    model, world, forwards = small_gpt().eval(), lone_world(torch.device("cpu")), []
    requests = [AnswerRequest(prompt, (), 8) for prompt in ("ab", "cd")]
    options: dict[str, Any] = {"micro_batch_size": 2, "world": world, "in_step": True}
    alone = generate_answers(model, model.config, Bytes(), requests, micro_batch_size=2, world=WORLD)
    assert generate_answers(model, model.config, Bytes(), requests, **options) == alone
    assert world.progress.count == 1 + 8, "the group and its tokens"

    def told_to_stop(*arguments: Any, **more: Any) -> torch.Tensor:
        forwards.append(arguments)
        if len(forwards) == 3:
            world.stop.request("SIGTERM")
        return model(*arguments, **more)

    with pytest.raises(Stopped):
        generate_answers(told_to_stop, model.config, Bytes(), requests, **options)
    assert len(forwards) == 3


def test_texts_are_cut_at_the_first_stop_string() -> None:
    assert cut_at("one. two\nthree", ("\n", ". ", "")) == "one"
    assert cut_at("one", ("\n",)) == "one"
