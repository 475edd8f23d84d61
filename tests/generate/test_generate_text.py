"""Sampling functions, the key/value cache against recomputation, streams of random numbers, and whole characters."""

import struct
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.load_model import LoadedModel
from megagpt.convert.llama2c import load_llama2c
from megagpt.generate.batch import Batch
from megagpt.generate.sampling import (
    SamplingConfig,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    penalise,
    penalise_repetition,
    pick,
)
from megagpt.generate.streams import generate_ids, stream_texts
from megagpt.generate.text_stream import StreamDecoder, TextStream
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.tokenizer.plain_bytes import Bytes


def small_gpt(family: str = "llama", **changes: object) -> GPT:
    sizes = {"vocab_size": 320, "seq_len": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32}
    model = GPT(ModelConfig.model_validate({**sizes, "family": family, "init_std": 0.3, **changes}))
    initialise(model, seed=3)
    return model.eval()


def loaded(model: GPT) -> LoadedModel:
    return LoadedModel(model, model.config, Bytes(), 0, {}, Path())


def ids_of(model: GPT, prompt: list[list[int]], **settings: object) -> list[list[int | None]]:
    options = {name: settings.pop(name) for name in ("vocab_size", "eos_ids", "streams") if name in settings}
    sampling = SamplingConfig.model_validate(settings)
    return list(generate_ids(model, model.config, torch.tensor(prompt), sampling, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3]), (None, [0, 1, 2, 3])]
)
def test_top_k(k: int | None, kept: list[int]) -> None:
    result = keep_top_k(torch.tensor([[1.0, 5.0, -2.0, 3.0]]), k)
    assert result.isfinite().nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, kept: list[int]) -> None:
    result = keep_top_p(torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64), p)
    assert result.nonzero()[:, 1].tolist() == kept


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0]])
    assert penalise_repetition(logits, torch.tensor([[0, 1, 1]]), 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    assert penalise_repetition(logits, torch.tensor([[0, 1]]), 1.0) is logits


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, [0, 1, 2, 3]), (0.1, [0, 1, 2, 3]), (0.11, [0, 1, 3]), (0.5, [1, 3]), (1.0, [1])]
)
def test_min_p_is_a_share_of_the_largest(p: float, kept: list[int]) -> None:
    result = keep_min_p(torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64), p)
    assert result.nonzero()[:, 1].tolist() == kept


def test_openai_s_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    logits, sampling = torch.tensor([1.0, 2.0, 3.0, 4.0]), SamplingConfig(frequency_penalty=0.5, presence_penalty=0.25)
    # https://platform.openai.com/docs: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    assert penalise(logits, [0, 0], [1, 3, 3, 3], sampling).tolist() == [1.0, 1.25, 3.0, 2.25]
    assert penalise(logits, [0, 0], [], sampling).tolist() == [1.0, 2.0, 3.0, 4.0]
    negative = SamplingConfig(frequency_penalty=-2.0)
    assert penalise(logits, [0], [1], negative).tolist() == [1.0, 4.0, 3.0, 4.0]
    both = SamplingConfig(repetition_penalty=2.0, presence_penalty=1.0)
    assert penalise(logits, [0], [1], both).tolist() == [0.5, 0.0, 3.0, 4.0]


def test_pick_follows_the_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0])
    draws = torch.arange(0, 1, 1 / 400, dtype=torch.float64)
    picked = pick(weights.expand(400, -1), draws)
    assert torch.bincount(picked, minlength=5).tolist() == [0, 100, 0, 200, 100]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}, {"min_p": 1.0}]
)
def test_settings_that_leave_one_token_take_the_likeliest(settings: dict[str, float]) -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    tokens = next_token(logits, torch.rand(16).double(), SamplingConfig.model_validate(settings))
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()


def test_draws_have_the_models_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = SamplingConfig(temperature=0.5)
    tokens = next_token(logits.expand(len(draws), -1), draws, sampling)
    found = torch.bincount(tokens, minlength=4) / len(draws)
    # The standard error of a share of 20,000 draws is at most 0.0035.
    torch.testing.assert_close(found, (logits[0] / 0.5).softmax(dim=0), rtol=0, atol=0.015)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_generation_equals_recomputing_every_token(family: str) -> None:
    model = small_gpt(family)
    prompt = [[5, 6, 7], [8, 9, 10]]
    found = ids_of(model, prompt, max_tokens=29, temperature=0.0)
    ids = torch.tensor(prompt)
    with torch.no_grad():
        for _ in range(29):
            ids = torch.cat((ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.tensor(found).T.tolist() == ids[:, 3:].tolist()
    assert len(set(ids[0].tolist())) > 5


def test_generation_goes_on_when_the_context_is_full() -> None:
    model = small_gpt()
    found = ids_of(model, [list(range(30))], max_tokens=60, temperature=0.0)
    assert len(found) == 60
    ids = torch.tensor([list(range(30))])
    with torch.no_grad():
        for step in range(60):
            # 2 tokens fit beside the prompt; then the last 16 are kept, beside which 16 fit.
            start = 0 if step < 3 else 30 + step - 16 - (step - 3) % 17
            ids = torch.cat((ids, model(ids[:, start:])[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert [token for (token,) in found] == ids[0, 30:].tolist()


def test_a_prompt_longer_than_the_context_is_cut_from_the_left() -> None:
    model = small_gpt()
    ids = torch.randint(320, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = int(model(ids[:, -32:])[0, -1].argmax())
    assert ids_of(model, ids.tolist(), max_tokens=1, temperature=0.0) == [[expected]]


def test_a_rows_text_depends_on_seed_and_stream_only() -> None:
    model = small_gpt()
    alone = ids_of(model, [[1, 2]], max_tokens=20, temperature=1.0, seed=5, streams=[2])
    together = ids_of(model, [[1, 2]] * 3, max_tokens=20, temperature=1.0, seed=5)
    assert [row[0] for row in alone] == [row[2] for row in together]
    assert [row[0] for row in together] != [row[1] for row in together]
    assert ids_of(model, [[1, 2]], max_tokens=20, temperature=1.0, seed=6, streams=[2]) != alone


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    model = small_gpt()
    tokens = [row[0] for row in ids_of(model, [[1]], max_tokens=200, temperature=5.0, vocab_size=10)]
    assert set(tokens) == set(range(10))


def test_rows_end_at_the_end_of_text_and_generation_when_all_have() -> None:
    model = small_gpt()
    free = ids_of(model, [[1, 2]] * 4, max_tokens=300, temperature=1.0, vocab_size=12)
    ended = ids_of(model, [[1, 2]] * 4, max_tokens=300, temperature=1.0, vocab_size=12, eos_ids=(7,))
    for row in range(4):
        first = [step[row] for step in free].index(7)
        expected = [step[row] for step in free][:first] + [None] * (len(ended) - first)
        assert [step[row] for step in ended] == expected
    assert len(ended) < len(free) == 300


def test_characters_come_out_whole() -> None:
    decoder = StreamDecoder(Bytes())
    pieces = [decoder.push(byte) for byte in "aé🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🙂"]
    assert [decoder.push(byte) for byte in b"\xf0\x9f"] == ["", ""]
    assert decoder.push(256) == ""
    assert decoder.finish() == "�"


def test_texts_of_prompts_of_different_lengths() -> None:
    model = loaded(small_gpt())
    prompts = ["ab", "", "cd", "efg"]
    sampling = SamplingConfig(max_tokens=12, temperature=1.0, stop_at_eot=False)
    texts = texts_of(model, prompts, sampling)
    for row, prompt in enumerate(prompts):
        ids = Bytes().encode(prompt) or [256]
        tokens = ids_of(model.model, [ids], max_tokens=12, temperature=1.0, vocab_size=257, streams=[row])
        assert texts[row] == Bytes().decode(token for (token,) in tokens if token is not None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_that_join_and_leave_are_those_generated_alone(family: str) -> None:
    model = small_gpt(family)
    prompts = [[5, 6, 7], list(range(20)), [9], [1, 2, 3, 4], [30, 31]]
    limits = [6, 9, 25, 3, 12]
    alone = [
        [token for (token,) in ids_of(model, [prompt], max_tokens=limit, temperature=0.0)]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    batch = Batch(model, model.new_cache(3), 32, torch.device("cpu"), max_prompt_tokens=7)
    waiting, found, ends = list(range(5)), {}, []
    while waiting or batch.texts:
        while waiting and len(batch.texts) < batch.num_slots:
            i = waiting.pop(0)
            found[batch.add(prompts[i], SamplingConfig(max_tokens=limits[i], temperature=0.0), stream=i)] = i
        for drawn in batch.step():
            if len(drawn.text.ids) - drawn.text.num_prompt == drawn.text.sampling.max_tokens:
                batch.remove(drawn.text)
                ends.append(found[drawn.text])
    assert {i: text.ids[text.num_prompt :] for text, i in found.items()} == dict(enumerate(alone))
    assert ends == [0, 3, 1, 4, 2]  # the long prompt is computed in three steps, and waits for nobody


def test_the_cache_is_allocated_once() -> None:
    model = small_gpt()
    batch = Batch(model, model.new_cache(2), 32, torch.device("cpu"))
    batch.add([1, 2], SamplingConfig())
    batch.step()
    stores = [store.data_ptr() for layer in batch.cache.layers for store in (layer.keys, layer.values) if store is not None]
    batch.add([3], SamplingConfig(), stream=1)
    for _ in range(60):
        batch.step()
    assert [s.data_ptr() for layer in batch.cache.layers for s in (layer.keys, layer.values) if s is not None] == stores
    assert len(stores) == 4
    with pytest.raises(ValueError, match="all 2 slots are taken"):
        batch.add([3], SamplingConfig())


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    model = small_gpt()
    batch = Batch(model, model.new_cache(1), 32, torch.device("cpu"), vocab_size=300)
    batch.add([1, 2], SamplingConfig(temperature=0.0, frequency_penalty=2.0), num_logprobs=3)
    (drawn,) = batch.step()
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2]]))[0, -1, :300].log_softmax(dim=-1)
    assert drawn.logprob is not None
    assert drawn.logprob.token == drawn.token == int(expected.argmax())
    # one forward with and one without a cache: other orders of fp32 sums
    assert drawn.logprob.logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert [i for i, _ in drawn.logprob.likeliest] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abcd", [], ["a", "b", "c", "d", ""]),
        ("abcd", ["bc"], ["a", "", "", ""]),
        ("abxbcd", ["bc"], ["a", "", "bx", "", "", ""]),
        ("ababac", ["abac"], ["", "", "", "ab", "", "", ""]),
        ("ab", ["abc"], ["", "", "ab"]),
        ("é\n\nx", ["\n\n", "é!"], ["", "", "é", "", ""]),
        ("xay", ["y", "a"], ["x", "", ""]),
        ("xyz", ["z", "yz"], ["x", "", "", ""]),
    ],
)
def test_nothing_of_a_stop_string_is_released(text: str, stop: list[str], pieces: list[str]) -> None:
    stream, found = TextStream(StreamDecoder(Bytes()), stop), []
    for byte in text.encode():
        if not stream.stopped:
            found.append(stream.push(byte))
    assert [*found, stream.finish()] == pieces
    assert stream.num_characters == len("".join(pieces))


def test_stop_strings_end_only_their_own_text() -> None:
    model = loaded(small_gpt())
    sampling = SamplingConfig(max_tokens=40, temperature=1.0, stop_at_eot=False)
    free = texts_of(model, ["ab", "c"], sampling)
    stop = free[0][7:9]
    ended = texts_of(model, ["ab", "c"], sampling.model_copy(update={"stop": (stop,)}))
    assert stop not in free[1]
    assert ended == [free[0][: free[0].index(stop)], free[1]]


def texts_of(model: LoadedModel, prompts: list[str], sampling: SamplingConfig) -> list[str]:
    texts = [""] * len(prompts)
    for row, piece in stream_texts(model, prompts, sampling):
        texts[row] += piece
    return texts


# A published model: 260K parameters, trained on TinyStories, and the text that its authors' own code gives.


def read_pieces(path: Path) -> list[bytes]:
    """The pieces of llama2.c's tokenizer file: a score, a length and the bytes of each."""
    data, position, pieces = path.read_bytes(), 4, []
    while position < len(data):
        (length,) = struct.unpack_from("<i", data, position + 4)
        piece = data[position + 8 : position + 8 + length]
        pieces.append(bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") else piece)
        position += 8 + length
    return pieces


@pytest.mark.realdata
def test_a_published_model_tells_its_published_story(shared_data: Path) -> None:
    model, pieces = load_llama2c(shared_data / "model" / "stories260K.bin"), read_pieces(shared_data / "model" / "tok512.bin")
    start_of_text = 1
    tokens = ids_of(model, [[start_of_text]], max_tokens=200, temperature=0.0, eos_ids=(start_of_text,))
    text = b"".join(pieces[token] for (token,) in tokens if token is not None).decode().removeprefix(" ")
    expected = (shared_data / "model" / "stories260K.expected.txt").read_text()
    assert len(tokens) == 200
    assert text.strip() == expected.strip()
