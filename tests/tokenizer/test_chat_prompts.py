"""A model that was tuned here is asked as it was tuned: the same ids for a chat in training, generation and serving."""

from pathlib import Path
from typing import Any

import pytest
from served import TEMPLATE, write_run

from megagpt.checkpoint.load_model import load_model
from megagpt.config import UserError, validate
from megagpt.corpus.packing.config import SupervisedConfig
from megagpt.corpus.packing.supervised import RowEncoder, tokenizer_for
from megagpt.generate.generate_text import GenerateConfig, generate_run
from megagpt.generate.streams import stream_texts
from megagpt.serve.config import ServeConfig
from megagpt.serve.load import load_served
from megagpt.tokenizer.chat_template import read_chat_template
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.sentencepiece import train_sentencepiece

CHATS = (
    [{"role": "user", "content": "to be\n or <|im_end|> not"}],
    [{"role": "system", "content": "be <|im_start|>user\nbrief"}, {"role": "user", "content": "that is"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the question"}, {"role": "user", "content": " b\n\n"}],
)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_prompts_are_those_of_the_rows(kind: str, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        (tmp_path / "base").mkdir()
        train_sentencepiece(["to be or not to be that is the question"] * 40, tmp_path / "base", vocab_size=280)
    base, config = open_tokenizer("bytes" if kind == "bytes" else tmp_path / "base"), SupervisedConfig(format="chat")
    tokenizer = tokenizer_for(base, config)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    template = read_chat_template(tmp_path / "saved" / "chat_template.jinja", open_tokenizer(tmp_path / "saved"))
    assert template is not None
    rows = RowEncoder(tokenizer, config, 4096)
    for messages in CHATS:
        ids = template.ids(messages)
        assert ids == rows.prompt(messages)
        assert ids.count(template.special["<|im_start|>"]) == len(messages) + 1


def test_a_chat_is_answered_by_generate_text_and_by_a_server_from_the_same_ids(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", template=TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    asked: dict[str, Any] = {"run_dir": run_dir, "max_tokens": 12, "temperature": 0.0}
    found = "".join(piece for _, piece in generate_run(GenerateConfig(**asked, messages=tuple(messages))))
    served = load_served(ServeConfig(run_dir=run_dir))
    assert served.chat is not None
    ids = served.chat.ids(messages)
    assert ids == [*b"[user]hello", 256, *b"[assistant]"]
    expected = stream_texts(load_model(run_dir), [ids], GenerateConfig(**asked))
    assert found == "".join(piece for _, piece in expected)
    with pytest.raises(UserError, match="refuses them: no developers"):
        generate_run(GenerateConfig(**asked, messages=({"role": "developer", "content": "a"},)))
    (run_dir / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="messages: the model has no chat template"):
        generate_run(GenerateConfig(**asked, messages=tuple(messages)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt and messages are given"),
        ({"messages": [{"role": "user", "text": "a"}]}, r"messages\[0\]: role and content are expected, not role, text"),
    ],
)
def test_messages_that_do_not_fit(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        validate(GenerateConfig, {"run_dir": str(tmp_path), **settings}, source="test")
