"""Begin-of-text and several end-of-text ids: read with the tokenizer, and used by packing, generation and evaluation."""

import io
import json
from pathlib import Path

import pytest
import torch

from megagpt.config import UserError
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.generate.text_stream import StreamDecoder
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.tokenizer.base import prompt_ids
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.sentencepiece import SentencePiece
from megagpt.tokenizer.special_ids import FILE_NAME, write_special_ids

TEXT = "The five boxing wizards jump quickly. Pack my box with five dozen liquor jugs! The quick brown fox.\n"


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama 2 has it: <s> = 1, </s> = 2, a space before every text."""
    import sentencepiece

    folder, model = tmp_path_factory.mktemp("llama"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([TEXT] * 8),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture
def with_bos(llama_like: Path, tmp_path: Path) -> SentencePiece:
    open_tokenizer(llama_like).save(tmp_path / "tokenizer")
    write_special_ids(tmp_path / "tokenizer", eos_ids=[2, 1], bos_id=1)
    return SentencePiece(tmp_path / "tokenizer" / "tokenizer.model")


def test_without_the_file_nothing_changes(llama_like: Path) -> None:
    for tokenizer in (open_tokenizer("bytes"), open_tokenizer(llama_like)):
        assert (tokenizer.eos_ids, tokenizer.bos_id) == ((tokenizer.eot_id,), None)
        assert prompt_ids(tokenizer, "") == [tokenizer.eot_id]
        assert prompt_ids(tokenizer, "fox") == tokenizer.encode("fox")


def test_a_dummy_prefix_is_left_out_again(llama_like: Path) -> None:
    tokenizer = open_tokenizer(llama_like)
    assert (tokenizer.dummy_prefix, tokenizer.lossless, open_tokenizer("bytes").dummy_prefix) == (True, False, False)
    for text in (TEXT, " two  spaces", "", "x", "\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    whole, rest = StreamDecoder(tokenizer, at_start=True), StreamDecoder(tokenizer)
    ids = tokenizer.encode("fox jumps")
    assert "".join(map(whole.push, [1, *ids])) == "fox jumps"  # <s> stands for no text
    assert "".join(map(rest.push, ids)) == " fox jumps"


def test_the_file_is_part_of_the_tokenizer(llama_like: Path, with_bos: SentencePiece, tmp_path: Path) -> None:
    assert (with_bos.bos_id, with_bos.eot_id, with_bos.eos_ids) == (1, 2, (2, 1))
    assert with_bos.fingerprint != open_tokenizer(llama_like).fingerprint
    assert prompt_ids(with_bos, "") == [1]
    assert prompt_ids(with_bos, "fox") == [1, *with_bos.encode("fox")]
    with_bos.save(tmp_path / "copy")
    copy = open_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.bos_id, copy.eos_ids) == (with_bos.fingerprint, 1, (2, 1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"eos_ids": [2]}, "a mapping of eos_ids"),
        ({"eos_ids": 2, "bos_id": None}, "a mapping of eos_ids"),
        ({"eos_ids": [], "bos_id": None}, "eos_ids=None: an id from 0 to"),
        ({"eos_ids": [2, 5000], "bos_id": 1}, "eos_ids=5000: an id from 0 to"),
        ({"eos_ids": [2], "bos_id": -1}, "bos_id=-1: an id from 0 to"),
        ({"eos_ids": [2], "bos_id": True}, "bos_id=True: an id from 0 to"),
    ],
)
def test_a_bad_file_is_named(with_bos: SentencePiece, tmp_path: Path, value: object, message: str) -> None:
    (tmp_path / "tokenizer" / FILE_NAME).write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"{FILE_NAME}: {message}"):
        open_tokenizer(tmp_path / "tokenizer")


def test_generation_ends_at_each_of_several_ids() -> None:
    model = GPT(ModelConfig(vocab_size=12, seq_len=16, num_layers=1, num_heads=1, hidden_size=8))
    initialise(model.eval(), seed=1)
    sampling = SamplingConfig(max_tokens=300, temperature=1.0)
    ended = list(generate_ids(model, model.config, torch.zeros(8, 1, dtype=torch.long), sampling, eos_ids=(3, 7)))
    last = [[row[i] for row in ended if row[i] is not None] for i in range(8)]
    assert all(not {3, 7} & set(ids) for ids in last)
    assert ended[-1] == [None] * 8
