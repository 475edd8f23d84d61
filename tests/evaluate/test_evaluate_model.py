"""Scores against slow, obvious versions; ranks and batch sizes must not matter; tasks; the tools on a real checkpoint."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.nn import functional
from whole_model import WholeModel

from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint.ownership import take_ownership
from megagpt.command import EXIT_DONE, EXIT_USER_ERROR, run_words
from megagpt.config import Failure, UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.shards import Manifest, ShardWriter, write_manifest
from megagpt.data.state import TrainState
from megagpt.distributed.world import World, lone_world
from megagpt.engine.build import build_engine
from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run, unigram_entropy
from megagpt.evaluate.likelihood import Likelihood, LikelihoodRequest, encode_request, log_likelihoods
from megagpt.evaluate.loss import Score, combine, evaluate_sources, validation_set
from megagpt.evaluate.results import read_results
from megagpt.evaluate.tasks import Question, read_files, read_task, score_task
from megagpt.generate.generate_text import GenerateConfig, generate_run
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.sentencepiece import train_sentencepiece

CPU = torch.device("cpu")
TEXTS = [f"Naïve café {i}: the {'quick ' * (i % 7)}brown fox – 東京 – jumps {i * 37} times.\n" for i in range(40)]


def write_source(root: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    """A folder of shards: all texts in validation/, two shards of them, and a train/ split."""
    dtype = np.dtype("uint16")
    for split in ("train", "validation"):
        infos = []
        for number in range(2):
            with ShardWriter(root / split, f"shard_{number:05d}", dtype) as writer:
                for i, text in enumerate(texts[number::2]):
                    tokens = np.array([*tokenizer.encode(text), tokenizer.eot_id], np.uint32)
                    writer.add(tokens, id=f"{number}:{i}", source="toy", text_bytes=len(text.encode()))
                infos.append(writer.close())
        manifest = Manifest(split, "uint16", tokenizer.vocab_size, tokenizer.eot_id, tokenizer.fingerprint, "", tuple(infos))
        write_manifest(root / split, manifest)
    tokenizer.save(root / "tokenizer")
    return root


def small_gpt(**changes: Any) -> GPT:
    sizes = {"vocab_size": 320, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32, "init_std": 0.2}
    model = GPT(ModelConfig.model_validate({**sizes, **changes}))
    initialise(model, seed=4)
    return model


def write_run(run_dir: Path, source: Path, model: GPT, **data: Any) -> Path:
    """A run directory with one checkpoint, of step 7; `data` are more settings of its data."""
    world = lone_world(CPU)
    run_config = {"data": {"seq_len": 32, "sources": {"toy": {"path": str(source)}}, **data}}
    info = {"config": run_config, "model": model.config.model_dump(mode="json")}
    attempt = take_ownership(run_dir, world)
    checkpoint.Saver(run_dir, world, attempt).save(WholeModel(model), TrainState(step=7), info)  # type: ignore[arg-type]
    open_tokenizer(source / "tokenizer").save(run_dir / "tokenizer")
    return run_dir


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("toy"), Bytes(), TEXTS)


@pytest.fixture(scope="module")
def run_dir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), source, small_gpt())


def test_the_name_of_a_validation_set_tells_all_that_a_loss_depends_on(source: Path, tmp_path: Path) -> None:
    def name(folder: Path = source, *, seq_len: int = 32, ends: bool = True, **changes: Any) -> str:
        datasets = {"toy": TokenDataset(folder / "validation", seq_len=seq_len, document_end_loss=ends)}
        return validation_set(datasets, **{"max_samples": None, "document_mask": False, **changes})

    same = write_source(tmp_path / "same", Bytes(), TEXTS)
    other = write_source(tmp_path / "other", Bytes(), TEXTS[1:])
    assert name() == name(same)
    names = [name(), name(other), name(seq_len=16), name(ends=False), name(max_samples=5), name(document_mask=True)]
    assert len(set(names)) == 6


def test_the_ends_of_documents_are_evaluated_as_they_were_trained(source: Path, tmp_path: Path) -> None:
    counted, ignored = (
        evaluate_run(EvaluateConfig(run_dir=write_run(tmp_path / str(ends), source, small_gpt(), document_end_loss=ends)))
        for ends in (True, False)
    )
    assert counted.total is not None
    assert ignored.total is not None
    assert counted.total.tokens - ignored.total.tokens == len(TEXTS) - 1, "nothing comes after the last document"
    measured = [read_results(found.path)[-1]["measured"]["validation_set"] for found in (counted, ignored)]
    assert measured[0] != measured[1]


def slow_score(model: GPT, dataset: TokenDataset, tokenizer: Tokenizer, max_samples: int | None = None) -> Score:
    """Token by token: windows of 32 targets, each token but the very first a target once."""
    tokens = dataset.tokens(0, dataset.num_tokens).tolist()
    nats, count, text, hits = 0.0, 0, 0, 0
    for start in range(0, len(tokens) - 1, 32)[:max_samples]:
        window = tokens[start : start + 33]
        with torch.no_grad():
            log_p = model(torch.tensor([window[:-1]]))[0].double().log_softmax(dim=-1)
        for position, target in enumerate(window[1:]):
            nats -= float(log_p[position, target])
            count, text = count + 1, text + len(tokenizer.token_bytes()[target])
            hits += int(log_p[position].argmax()) == target
    return Score(nats, count, text, hits)


@pytest.mark.parametrize(("micro_batch_size", "max_samples"), [(1, None), (3, None), (64, None), (4, 5)])
def test_scores_equal_the_slow_sum(source: Path, micro_batch_size: int, max_samples: int | None) -> None:
    model = small_gpt().eval()
    dataset = TokenDataset(source / "validation", seq_len=32)
    options = {"micro_batch_size": micro_batch_size, "max_samples": max_samples}
    found = evaluate_sources(model, model, {"toy": dataset}, Bytes(), lone_world(CPU), **options)["toy"]
    expected = slow_score(model, dataset, Bytes(), max_samples)
    assert (found.tokens, found.text_bytes, found.hits) == (expected.tokens, expected.text_bytes, expected.hits)
    assert found.hits > 0
    assert found.accuracy == expected.hits / expected.tokens
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)  # fp32 logits, other batch shapes
    assert found.perplexity == pytest.approx(math.exp(expected.nats / expected.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected.nats / math.log(2) / expected.text_bytes, rel=1e-6)


def test_bytes_are_those_of_the_text(source: Path, tmp_path: Path) -> None:
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    sentencepiece = train_sentencepiece(TEXTS, tmp_path / "tokenizer", vocab_size=310)
    other = write_source(tmp_path / "toy", sentencepiece, TEXTS)
    for tokenizer, folder in ((Bytes(), source), (sentencepiece, other)):
        model = small_gpt().eval()
        dataset = TokenDataset(folder / "validation", seq_len=32)
        score = evaluate_sources(model, model, {"toy": dataset}, tokenizer, lone_world(CPU), micro_batch_size=8)["toy"]
        first = len(tokenizer.token_bytes()[int(dataset.tokens(0, 1)[0])])  # the first token is no target
        assert score.text_bytes == text_bytes - first == dataset.manifest.text_bytes - first


def scores_on_ranks(world: World, source: Path) -> Score:
    model = small_gpt()
    dataset = TokenDataset(source / "validation", seq_len=32)
    return evaluate_sources(model, model, {"toy": dataset}, Bytes(), world, micro_batch_size=3)["toy"]


@pytest.mark.slow
def test_ranks_share_the_work_and_agree(source: Path, tmp_path: Path) -> None:
    alone = scores_on_ranks(lone_world(CPU), source)
    first, second, third = run_ranks(scores_on_ranks, 3, tmp_path, source)
    assert first == second == third
    assert (first.tokens, first.text_bytes, first.hits) == (alone.tokens, alone.text_bytes, alone.hits)
    assert first.nats == pytest.approx(alone.nats, rel=1e-12)  # the same batches, summed in another order in fp64


def scores_on_engines(world: World, source: Path) -> list[Score]:
    datasets, scores = {"toy": TokenDataset(source / "validation", seq_len=32)}, []
    for engine in (DeepSpeedConfig(zero_stage=1), DeepSpeedConfig(zero_stage=3), FSDPConfig()):
        config = small_gpt().config
        built = build_engine(config, OptimConfig(), engine, world, precision="fp32", micro_batch_size=3)
        draw_weights(built, config, seed=4)
        options = {"micro_batch_size": 3}
        scores.append(evaluate_sources(built.model, built.module, datasets, Bytes(), world, **options)["toy"])
    return scores


@pytest.mark.slow
def test_every_engine_counts_what_the_model_hits(source: Path, tmp_path: Path) -> None:
    alone = scores_on_ranks(lone_world(CPU), source)
    for scores in run_ranks(scores_on_engines, 2, tmp_path, source):
        for score in scores:
            assert (score.hits, score.tokens) == (alone.hits, alone.tokens)
            assert score.nats == pytest.approx(alone.nats, rel=1e-6)


def test_dropout_and_z_loss_are_off_while_evaluating_and_back_afterwards(source: Path) -> None:
    plain, model = small_gpt(), small_gpt(dropout=0.5, z_loss=0.1)
    model.train()
    datasets = {"toy": TokenDataset(source / "validation", seq_len=32)}
    found = evaluate_sources(model, model, datasets, Bytes(), lone_world(CPU), micro_batch_size=8)
    assert found == evaluate_sources(plain, plain, datasets, Bytes(), lone_world(CPU), micro_batch_size=8)
    assert model.training


def test_scores_combine_by_tokens() -> None:
    total = combine([Score(10.0, 4, 9, 3), Score(2.0, 12, 3, 5)])
    assert (total.nats, total.tokens, total.text_bytes, total.loss, total.accuracy) == (12.0, 16, 12, 0.75, 0.5)
    assert total.bits_per_byte == pytest.approx(1 / math.log(2))
    assert Score(1.0, 1, 0, 0).bits_per_byte is None


def test_unigram_entropy_by_hand(source: Path) -> None:
    tokens = [token for text in TEXTS for token in [*text.encode(), 256]]
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert unigram_entropy(TokenDataset(source / "validation", seq_len=32)) == pytest.approx(expected, rel=1e-12)


# Likelihoods and tasks


def slow_likelihood(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    nats, greedy = 0.0, True
    for i, token in enumerate(continuation):
        ids = (context + continuation[:i])[-32:]
        with torch.no_grad():
            log_p = functional.log_softmax(model(torch.tensor([ids]))[0, -1], dim=-1)
        nats += float(log_p[token])
        greedy &= int(log_p.argmax()) == token
    return nats, greedy


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_likelihoods_equal_the_slow_ones_in_order(micro_batch_size: int) -> None:
    model = small_gpt().eval()
    rng = np.random.default_rng(1)
    pairs = [
        (rng.integers(0, 300, m).tolist(), rng.integers(0, 300, n).tolist()) for m, n in [(5, 3), (1, 1), (20, 12), (3, 9)]
    ]
    with torch.no_grad():
        likely = int(model(torch.tensor([[5, 6, 7]]))[0, -1].argmax())
    pairs.append(([5, 6, 7], [likely]))
    requests = [LikelihoodRequest(tuple(a), tuple(b)) for a, b in pairs]
    found = log_likelihoods(model, model.config, requests, eot_id=256, micro_batch_size=micro_batch_size)
    for likelihood, (context, continuation) in zip(found, pairs, strict=True):
        nats, greedy = slow_likelihood(model, context, continuation)
        assert likelihood.nats == pytest.approx(nats, abs=1e-4)
        assert likelihood.is_greedy == greedy
    assert found[-1].is_greedy


def likelihoods_on_ranks(world: World) -> list[Likelihood]:
    model = small_gpt().eval()
    rng = np.random.default_rng(2)
    requests = [LikelihoodRequest((*rng.integers(0, 300, 1 + i % 9).tolist(),), (i, i + 1)) for i in range(20)]
    return log_likelihoods(model, model.config, requests, eot_id=256, micro_batch_size=3, world=world)


@pytest.mark.slow
def test_likelihoods_have_the_same_bits_on_two_ranks(tmp_path: Path) -> None:
    alone = likelihoods_on_ranks(lone_world(CPU))
    assert run_ranks(likelihoods_on_ranks, 2, tmp_path) == [alone, alone]


def test_likelihoods_at_the_limits_of_the_context() -> None:
    model = small_gpt().eval()
    long = list(range(100))

    def nats(context: list[int], continuation: list[int]) -> float:
        request = LikelihoodRequest(tuple(context), tuple(continuation))
        return log_likelihoods(model, model.config, [request], eot_id=256)[0].nats

    assert nats(long, [5, 6]) == nats(long[-31:], [5, 6])
    assert nats(long, [5, 6]) != pytest.approx(nats(long[-30:], [5, 6]), abs=1e-4)
    assert nats([], [5, 6]) == nats([256], [5, 6])
    assert nats(long, long[:32]) == nats(long[-1:], long[:32])
    by_hand = nats([3], long[:16]) + nats([3, *long[:16]], long[16:32]) + nats([3, *long[:32]], long[32:40])
    assert nats([3], long[:40]) == pytest.approx(by_hand, abs=1e-9)


def test_every_piece_of_a_long_continuation_must_be_greedy() -> None:
    model = small_gpt().eval()
    ids = [3]
    with torch.no_grad():
        for i in range(40):
            # The pieces of a continuation of 40 are 16, 16 and 8; the last two see the 32 - 15 or more tokens before them.
            start = max(0, len(ids) - 32) if i < 16 else max(0, 1 + i // 16 * 16 + min(16, 40 - i // 16 * 16) - 33)
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))

    def is_greedy(continuation: list[int]) -> bool:
        return log_likelihoods(model, model.config, [LikelihoodRequest((3,), tuple(continuation))], eot_id=256)[0].is_greedy

    assert is_greedy(ids[1:])
    assert not is_greedy([(ids[1] + 1) % 256, *ids[2:]])
    assert not is_greedy([*ids[1:-1], (ids[-1] + 1) % 256])


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ({"context": "I see", "continuation": "you"}, Question((("I see", " you"),), 0, ("you",))),
        ({"query": "Q:\n", "choices": ["a", "b"], "gold": 1}, Question((("Q:\n", "a"), ("Q:\n", "b")), 1, ("a", "b"))),
        (
            {"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 1},
            Question((("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " b")), 1, ("a", "b")),
        ),
        (
            {"query": "Question: Why?\nAnswer:", "choices": ["a"], "gold": 0},
            Question((("Question: Why?\nAnswer:", " a"),), 0, ("a",)),
        ),
        (
            {"context_options": ["A", "B"], "continuation": "ran.", "gold": 1},
            Question((("A", " ran."), ("B", " ran.")), 1, ("ran.", "ran.")),
        ),
        (
            {"sentence_good": "He is.", "sentence_bad": "He are."},
            Question((("", " He is."), ("", " He are.")), 0, ("He is.", "He are.")),
        ),
    ],
)
def test_kinds_of_questions(tmp_path: Path, line: dict[str, Any], question: Question) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_task(path) == [question]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1: no question"),
        ('{"query": "Q", "choices": ["a"], "gold": 1}\n', "IndexError"),
        ('{"query": "Q", "choices": ["a"], "gold": -1}\n', "gold=-1 of 1 options"),
        ("", "no questions"),
        ("x", "line 1"),
    ],
)
def test_what_is_no_task_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_task(path)


def test_accuracy_counts() -> None:
    table = {"aa": -1.0, "bbbb": -1.5, " c": -3.0, " ddd": -2.0, "e": -0.5, " éé": -2.0, " abc": -2.4}
    questions = [
        Question((("", "aa"), ("", "bbbb")), 0, ("aa", "bbbb")),  # right by likelihood, wrong by length
        Question((("x", " c"), ("x", " ddd")), 1, ("c", "ddd")),  # right either way
        Question((("", "e"),), 0, ("e",)),
        # Per character -1 against -0.8, per byte -0.5 against -0.8: the characters of é count once, the space never.
        Question((("x", " éé"), ("x", " abc")), 0, ("éé", "abc")),
    ]
    result = score_task(lambda pairs: [(table[text], text == "e") for _, text in pairs], questions)
    assert (result.questions, result.accuracy, result.accuracy_per_character, result.accuracy_per_byte) == (4, 1.0, 0.5, 0.75)
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 2) / 4)
    assert result.loss_of_gold == pytest.approx((1.0 + 2.0 + 0.5 + 2.0) / 4)
    assert result.bits_per_byte == pytest.approx((1.0 + 2.0 + 0.5 + 2.0) / math.log(2) / (2 + 3 + 1 + 4))
    assert result.standard_error == 0.0
    assert result.standard_error_per_character == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4))  # sqrt(p (1 - p) / (n - 1))
    assert result.standard_error_per_byte == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert score_task(lambda pairs: [(-1.0, True)], questions[2:3]).standard_error is None


class Merging(Bytes):
    """Bytes whose "a b" and "ab" are one id each, as a byte-pair encoding may have it."""

    def encode(self, text: str) -> list[int]:
        return [*text.replace("a b", "\x01").replace("ab", "\x02").encode()]


class Beginning(Merging):
    bos_id = 3


@pytest.mark.parametrize(
    ("tokenizer", "context", "continuation", "expected"),
    [
        (Merging(), "xa", "yb", ("xa", "yb")),
        (Merging(), "xa", " bc", ("xa", "c")),  # together x, "a b", c: cut behind as many ids as the context has alone
        (Merging(), "x \n", "y", ("x", " \ny")),  # white space of the context goes over
        (Merging(), "", "ab", ([256], "\x02")),
        (Merging(), " ", "y", ([256], " y")),
        (Beginning(), "", "xy", ([3], "xy")),
        (Beginning(), "x", "y", ("\x03x", "y")),
    ],
)
def test_context_and_continuation_are_encoded_together(
    tokenizer: Tokenizer, context: str, continuation: str, expected: tuple[str | list[int], str]
) -> None:
    first, second = ((*part.encode(),) if isinstance(part, str) else tuple(part) for part in expected)
    found = encode_request(tokenizer, context, continuation)
    assert found == LikelihoodRequest(first, second)


def test_a_continuation_that_adds_no_token_is_named() -> None:
    with pytest.raises(UserError, match="continuation 'b' after 'xa' adds no token to the 2 before it"):
        encode_request(Merging(), "xa", "b")


def test_padding_of_the_vocabulary_gets_no_probability() -> None:
    model = small_gpt().eval()
    request = LikelihoodRequest((5, 6), (7,))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]]))[0, -1]
    for vocab_size in (None, 300):
        [found] = log_likelihoods(model, model.config, [request], eot_id=256, vocab_size=vocab_size)
        assert found.nats == pytest.approx(float(logits[:vocab_size].log_softmax(-1)[7]), abs=1e-6)
    assert log_likelihoods(model, model.config, [LikelihoodRequest((5,), ())], eot_id=256) == [Likelihood(0.0, True)]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "questions", "options"),
    [
        ("lambada_openai", 5153, 1),
        ("piqa", 1838, 2),
        ("copa", 100, 2),
        ("arc_easy", 2376, 4),
        ("openbook_qa", 500, 4),
        ("winograd_wsc", 273, 2),
        ("blimp/wh_island", 1000, 2),
    ],
)
def test_published_tasks_are_read(shared_data: Path, name: str, questions: int, options: int) -> None:
    task = read_task(shared_data / "eval" / f"{name}.jsonl")
    assert len(task) == questions
    assert Counter(len(question.options) for question in task).most_common(1)[0][0] == options


# On a run


def test_evaluate_run_writes_what_it_found(run_dir: Path, source: Path, tmp_path: Path) -> None:
    task = tmp_path / "pairs.jsonl"
    task.write_text(json.dumps({"sentence_good": "brown fox", "sentence_bad": "\x00\x01"}) + "\n")
    config = EvaluateConfig(run_dir=run_dir, tasks={"pairs": task}, device="cpu")
    found = evaluate_run(config)
    dataset = TokenDataset(source / "validation", seq_len=32)
    expected = slow_score(small_gpt().eval(), dataset, Bytes())
    assert found.step == 7
    assert found.total == combine([found.sources["toy"]])
    assert found.total.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.tasks["pairs"].questions == 1
    path = run_dir / "evaluations" / "step_00000007.json"
    (written,) = read_results(path)
    assert written["loss"] == found.total.loss
    assert written["sources"]["toy"]["unigram_entropy"] == unigram_entropy(dataset)
    assert written["tasks"]["pairs"]["chance"] == 0.5

    # Fewer samples and no task are another measurement: it takes the place of none. The same one again is one result.
    evaluate_run(config.model_copy(update={"tasks": {}, "max_samples": 1}))
    evaluate_run(config)
    short, whole = read_results(path)
    assert (short["tokens"], short["tasks"]) == (32, {})
    assert whole == written


def test_whatever_differs_in_what_is_measured_is_a_result_of_its_own(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    config = EvaluateConfig(run_dir=write_run(tmp_path / "run", source, small_gpt()), device="cpu", max_samples=2)
    task, asked = tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    task.write_text('{"context": "a", "continuation": "b"}\n')
    asked.write_text('{"prompt": "fox", "answer": "x"}\n')
    changes: list[dict[str, Any]] = [
        {},
        {"max_samples": 3},
        {"tasks": {"t": task}},
        {"tasks": {"t": task}, "max_samples": 3},
        {"exercises": {"e": asked}, "answer_tokens": 4},
        {"exercises": {"e": asked}, "answer_tokens": 5},
        {"exercises": {"e": asked}, "answer_tokens": 5, "answer_stop": ("o",)},
        {"shards": {"other": source / "validation"}},
    ]
    for _ in range(2):
        found = [evaluate_run(config.model_copy(update=changed)) for changed in changes]
    assert len(read_results(found[0].path)) == len(changes)
    for path, (key, number) in ((task, ("tasks", 2)), (asked, ("exercises", 5))):
        path.write_text(path.read_text() * 2)  # the same name
        evaluate_run(config.model_copy(update=changes[number]))
        assert len(read_results(found[0].path)) == len(changes) + ["tasks", "exercises"].index(key) + 1


def test_the_tools_run_on_the_checkpoint(run_dir: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import evaluate_model
    import generate_text

    words = [f"run_dir={run_dir}", "device=cpu", f"shards.other={source / 'validation'}", "max_samples=2"]
    assert run_words(EvaluateConfig, evaluate_model.run, "", words) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "other " in printed
    assert "tokens 64" in printed
    words = [f"run_dir={run_dir}", "device=cpu", "prompt=fox", "max_tokens=20", "temperature=0", "stop_at_eot=false"]
    assert run_words(GenerateConfig, generate_text.run, "", words) == EXIT_DONE
    printed = capsys.readouterr().out
    pieces = [
        piece
        for _, piece in generate_run(
            GenerateConfig(run_dir=run_dir, prompt="fox", max_tokens=20, temperature=0, stop_at_eot=False)
        )
    ]
    assert printed == "fox" + "".join(pieces) + "\n"
    assert run_words(GenerateConfig, generate_text.run, "", [*words, "num_samples=2"]) == EXIT_DONE
    assert capsys.readouterr().out == f"--- sample 0\n{printed.rstrip()}\n--- sample 1\n{printed}".replace("\n\n", "\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": "no/such/run"}, "no such run directory"),
        ({"step": 8}, "there is no checkpoint of step 8"),
        ({"shards.x": "no/such/shards"}, "manifest.json"),
        ({"tasks.x": "no/such/task.jsonl"}, "No such file"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
    ],
)
def test_mistakes_are_one_clear_error(
    run_dir: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    import evaluate_model

    words = [f"{key}={value}" for key, value in {"run_dir": run_dir, "device": "cpu", **changes}.items()]
    assert run_words(EvaluateConfig, evaluate_model.run, "", words) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def refusals(world: World, folder: Path, run_dir: Path, source: Path) -> list[str]:
    """What each rank is told of files that only rank 1 cannot read, or reads otherwise, and of a result that rank 0 cannot
    write."""
    own, found = folder / f"rank{world.rank}", []
    changes: list[dict[str, Any]] = [
        {"tasks": {"t": own / "task.jsonl"}},
        {"exercises": {"e": own / "exercise.jsonl"}},
        {"shards": {"s": own / "validation"}},
        {"run_dir": own / "run"},
        {"tasks": {"t": own / "other.jsonl"}},
        {"run_dir": folder / "unwritable"},
        {"run_dir": folder / "unwritable", "tasks": {"t": folder / "rank0" / "task.jsonl"}},
    ]
    for changed in changes:
        with pytest.raises((UserError, Failure)) as raised:
            evaluate_run(
                EvaluateConfig.model_validate({"run_dir": run_dir, "device": "cpu", "max_samples": 2, **changed}), world
            )
        found.append(str(raised.value))
    return found


@pytest.mark.slow
def test_what_one_rank_cannot_read_or_write_every_rank_names(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "rank0", tmp_path / "rank1"
    first.mkdir()
    second.mkdir()
    (first / "task.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    (first / "exercise.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    shutil.copytree(source / "validation", first / "validation")
    for folder, count in ((first, 1), (second, 2)):
        (folder / "other.jsonl").write_text('{"context": "a", "continuation": "b"}\n' * count)
    run_dir = write_run(first / "run", source, small_gpt())
    (write_run(tmp_path / "unwritable", source, small_gpt()) / "evaluations").touch()
    found, also = run_ranks(refusals, 2, tmp_path / "ranks", tmp_path, run_dir, source)
    assert found == also
    expected = (
        f"tasks.t: {second}/task.jsonl: No such file",
        f"exercises.e: {second}/exercise.jsonl: No such file",
        f"{second}/validation: no manifest.json",
        f"{second}/run: no such run directory",
        f"run_dir={run_dir}: rank 1 finds tasks={{'t': '",
        "unwritable/evaluations",
        "unwritable/evaluations/unfinished_step_00000007_",
    )
    for message, words in zip(found, expected, strict=True):
        assert words in message


def test_a_disk_that_fails_is_named_with_the_file() -> None:
    with pytest.raises(Failure, match=r"tasks\.t: /proc/self/mem: Input/output error"):
        read_files("tasks", {"t": Path("/proc/self/mem")}, read_task, None)


def test_shards_of_another_tokenizer_are_refused(run_dir: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "toy", train_sentencepiece(TEXTS, tmp_path / "tokenizer", vocab_size=310), TEXTS)
    with pytest.raises(UserError, match="made with tokenizer"):
        evaluate_run(EvaluateConfig(run_dir=run_dir, shards={"other": other / "validation"}, device="cpu"))
