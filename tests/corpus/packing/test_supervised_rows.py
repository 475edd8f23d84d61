"""Rows of fine-tuning data: ids and masks as transformers has them, whole rows in samples, malformed rows by file and line."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.config import UserError, validate
from megagpt.corpus.packing.best_fit import pack_whole
from megagpt.corpus.packing.config import SupervisedConfig, TokenizeConfig
from megagpt.corpus.packing.rows import read_rows
from megagpt.corpus.packing.supervised import RowEncoder, tokenizer_for
from megagpt.corpus.packing.templates import CHATML
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.shards import ShardError, verify_shard
from megagpt.documents import IGNORE, Document
from megagpt.files import read_json
from megagpt.report.inspect_data import InspectConfig, inspect
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.extended import extends
from megagpt.tokenizer.open_tokenizer import open_tokenizer

SEQ_LEN = 96
INLINE = Execution(num_workers=1, executor="inline")
HARD = (
    "hi",
    "two\n\nlines ",
    "\n\nbegins so",
    "  spaces",
    "<|im_end|> in a text",
    "<|im_start|>user\nno",
    "Ünï 日本",
    "{{ x }}",
)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def conversations(count: int) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        turns = 2 * int(rng.integers(1, 4))
        messages = chat(*(" ".join(rng.choice(HARD, 3)) for _ in range(turns)))
        made.append([{"role": "system", "content": "Be brief."}, *messages] if rng.random() < 0.5 else messages)
    return made


def encoder(tokenizer: Tokenizer, seq_len: int = 4096, **settings: Any) -> RowEncoder:
    config = SupervisedConfig.model_validate({"format": "chat", **settings})
    return RowEncoder(tokenizer_for(tokenizer, config), config, seq_len)


def encoded(rows: RowEncoder, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    problems: list[tuple[str, str]] = []
    found = rows.encode(Document("x", "", "x", meta={"messages": messages}), lambda *problem: problems.append(problem))
    assert found is not None, problems
    return found[0].tolist(), found[1].tolist()


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def pack(folder: Path, inputs: list[Path], **settings: Any) -> Path:
    supervised = {"format": "chat", **settings.pop("supervised", {})}
    values = {
        "pack_seq_len": SEQ_LEN,
        "validation_fraction": 0.2,
        "overlap_threshold": None,
        "supervised": supervised,
        **settings,
    }
    config = validate(TokenizeConfig, values, source="test")
    pack_documents(inputs, folder, "bytes", config, INLINE)
    return folder


def test_chatml_is_spelt_as_its_definition_says_and_only_answers_are_targets() -> None:
    ids, targets = encoded(encoder(open_tokenizer("bytes")), chat("ab", "cd", "e", "f"))
    start, end = 257, 258
    expected = [start, *b"user\nab", end, *b"\n", start, *b"assistant\ncd", end, *b"\n"]
    expected += [start, *b"user\ne", end, *b"\n", start, *b"assistant\nf", end, *b"\n"]
    assert ids == expected
    learned = [token for token, target in zip([*ids, 256], targets, strict=True) if target]
    assert learned == [*b"cd", end, *b"f", end]


def test_a_prompt_is_the_beginning_of_the_row_with_its_answer() -> None:
    rows, (question, answer) = encoder(open_tokenizer("bytes")), chat("ab", "cd")
    prompt, (whole, _) = rows.prompt([question]), encoded(rows, [question, answer])
    assert prompt == whole[: len(prompt)]
    assert whole[len(prompt) :] == [*b"cd", 258, *b"\n"]


def test_no_text_gives_a_special_token() -> None:
    ids, _ = encoded(encoder(open_tokenizer("bytes")), chat("<|im_end|><|im_start|>assistant\nyes", "<|im_end|>"))
    assert Counter(ids)[257] == 2
    assert Counter(ids)[258] == 2
    assert bytes(number for number in ids if number < 256).decode().count("<|im_end|>") == 2


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sentencepiece"])
def test_ids_and_masks_are_those_of_transformers(kind: str, shared_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from megagpt.convert.tokenizers import export_tokenizer

    base = sentencepiece(tmp_path) if kind == "sentencepiece" else "bytes"
    base = shared_data / "tokenizer" / "gpt2" if kind == "gpt2" else base
    config = SupervisedConfig(format="chat")
    tokenizer = tokenizer_for(open_tokenizer(base), config)
    tokenizer.save(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    export_tokenizer(open_tokenizer(tmp_path / "ours"), tmp_path / "ours", tmp_path / "theirs", 4096)
    named = tokenizer_for(open_tokenizer(tmp_path / "theirs" / "tokenizer.json"), config)  # it has these tokens already
    assert (named.tokens, named.vocab_size) == (tokenizer.tokens, tokenizer.vocab_size)  # type: ignore[attr-defined]
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours = encoder(open_tokenizer(tmp_path / "ours"))
    for messages in conversations(200):
        plain = [{**message, "content": message["content"].replace("<|im", "<im")} for message in messages]
        found = theirs.apply_chat_template(plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, targets = encoded(ours, plain)
        assert ids == found["input_ids"], plain
        # transformers marks a token that begins before the answer and reaches into it; it is seen in the prompt, so not learned
        strays = np.flatnonzero(np.array(targets[:-1], int) != np.array(found["assistant_masks"]))
        assert all(found["assistant_masks"][i] and not targets[i] for i in strays)
        assert len(strays) <= sum(message["role"] == "assistant" for message in plain) * (kind == "gpt2")


def sentencepiece(folder: Path) -> Path:
    from megagpt.tokenizer.sentencepiece import train_sentencepiece

    train_sentencepiece([f"{text} {text}s and more\n" for text in HARD for _ in range(20)], folder / "sp", vocab_size=330)
    return folder / "sp"


def test_an_extended_tokenizer_keeps_ids_and_survives_saving(tmp_path: Path) -> None:
    base = open_tokenizer("bytes")
    tokenizer = tokenizer_for(base, SupervisedConfig(format="chat"))
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.vocab_size, again.eos_ids, again.fingerprint) == (259, (256, 258), tokenizer.fingerprint)
    assert again.encode("<|im_start|>") == list(b"<|im_start|>")
    assert again.decode([257, *b"ab", 258]) == "ab"
    assert tokenizer_for(again, SupervisedConfig(format="chat")).fingerprint == tokenizer.fingerprint
    assert extends(again, base)
    assert not extends(base, again)
    (tmp_path / "t.jinja").write_text("{% generation %}{{ messages[0]['content'] }}<A>{% endgeneration %}")
    template = {"template": str(tmp_path / "t.jinja")}
    other = tokenizer_for(base, SupervisedConfig(format="chat", special_tokens=("<A>", "<B>"), **template))
    assert not extends(other, again)  # the same number of new ids, but they mean something else


def test_a_template_may_be_any_jinja_with_a_mark_for_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}\n  {% if m['role'] == 'assistant' %}\n"
        "{% generation %} {{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ m['content'] }} "
        "[/INST]{% endif %}{% endfor %}"
    )
    ids, targets = encoded(encoder(open_tokenizer("bytes"), template=str(path)), chat("q", " a "))
    assert bytes(ids) == b"[INST] q [/INST] a"
    assert targets == [False] * 16 + [True] * 3  # " a" and the end of text
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match=r"t\.jinja: has no \{% generation %\}"):
        encoder(open_tokenizer("bytes"), template=str(path))
    path.write_text("{% generation %}\n{% if %}{% endgeneration %}")
    with pytest.raises(UserError, match=r"t\.jinja: line 2: not a Jinja template"):
        encoder(open_tokenizer("bytes"), template=str(path))
    path.write_text("{% generation %}{{ messages.__class__.__mro__ }}{% endgeneration %}")
    problems: list[tuple[str, str]] = []
    row = Document("x", "", "x", meta={"messages": chat("q", "a")})
    rows = encoder(open_tokenizer("bytes"), template=str(path))
    assert rows.encode(row, lambda *problem: problems.append(problem)) is None
    assert [kind for kind, _ in problems] == ["template"]


FORMATS = [
    ("prompt_completion", {"prompt": "p", "completion": "c"}, {}, ("p", "c")),
    ("dialogue_summary", {"dialogue": "A: hi", "summary": "s"}, {}, ("Summarize this dialogue.\n\nA: hi", "s")),
    ("question_answer", {"question": "1+1?", "answer": "#### 2"}, {}, ("1+1?", "#### 2")),
    ("text_label", {"text": "good", "label": 1}, {"labels": {"1": "yes"}}, ("good", "yes")),
    ("text_label", {"text": "x {text}", "label": "no"}, {"prompt": "Is it? {text}"}, ("Is it? x {text}", "no")),
]


@pytest.mark.parametrize(("format", "row", "settings", "expected"), FORMATS)
def test_a_row_of_each_format(format: str, row: Any, settings: Any, expected: tuple[str, str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    config = SupervisedConfig.model_validate({"format": format, "system": "S", **settings})
    [document] = read_rows(path, config, lambda *problem: pytest.fail(str(problem)))
    assert [(m["role"], m["content"]) for m in document.meta["messages"]] == [
        ("system", "S"), ("user", expected[0]), ("assistant", expected[1]),
    ]  # fmt: skip
    assert (document.id, document.source) == ("rows.jsonl:1", "rows")


BAD = [
    ("{not json", "not_json", "not valid JSON"),
    ("[1]", "not_json", "a list, a JSON object is expected"),
    ({"messages": []}, "fields", "messages: a list of objects"),
    ({"messages": chat("only a question")}, "empty_answer", "no message of the assistant"),
    ({"messages": chat("q", " \n")}, "empty_answer", r"messages\[1\]: the answer is empty"),
    ({"messages": [{"role": "robot", "content": "x"}, *chat("q", "a")]}, "role", r"messages\[0\].role='robot'"),
    ({"messages": [{"role": "user"}, *chat("q", "a")]}, "fields", r"messages\[0\].content: text is expected, not NoneType"),
]


@pytest.mark.parametrize(("row", "kind", "text"), BAD)
def test_a_malformed_row_is_named_by_file_and_line(row: Any, kind: str, text: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": chat("q", "a")}, "", row])
    with pytest.raises(UserError, match=rf"max_malformed=0: 1 malformed .*\n  .*rows\.jsonl: line 3: {kind}: {text}"):
        pack(tmp_path / "out", [path], supervised={"max_malformed": 0})
    assert not (tmp_path / "out" / "summary.json").exists()


def test_labels_columns_and_prompts_that_do_not_fit(tmp_path: Path) -> None:
    labels = write_lines(tmp_path / "a.tsv", ["good\t1", "bad\t0", "what\t7", "no tab", "\t1", "x" * 200 + "\t1"])
    settings = {"format": "text_label", "labels": {"0": "no", "1": "yes"}, "max_malformed": 4}
    folder = pack(tmp_path / "out", [labels], supervised=settings, validation_fraction=0)
    found = [json.loads(line) for line in (folder / "malformed.jsonl").read_text().splitlines()]
    assert [(row["line"], row["kind"]) for row in found] == [
        (3, "label"), (4, "fields"), (5, "empty_prompt"), (6, "no_target"),
    ]  # fmt: skip
    assert read_json(folder / "summary.json")["rows"]["malformed"] == {
        "empty_prompt": 1, "fields": 1, "label": 1, "no_target": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="max_malformed=3"):
        pack(tmp_path / "other", [labels], supervised={**settings, "max_malformed": 3}, validation_fraction=0)


def test_settings_that_do_not_fit() -> None:
    def refused(match: str, **values: Any) -> None:
        with pytest.raises(UserError, match=match):
            validate(TokenizeConfig, values, source="test")

    refused("supervised needs pack_seq_len", supervised={"format": "chat"})
    refused("rows are split by hash", supervised={"format": "chat"}, pack_seq_len=8, split_by="tail")
    refused(r"\{text\} must be in it", supervised={"format": "text_label", "prompt": "x"}, pack_seq_len=8)
    refused("labels are for format=text_label", supervised={"format": "chat", "labels": {"a": "b"}}, pack_seq_len=8)
    refused("'<B>' is not one of special_tokens", supervised={"format": "chat", "template": "x", "end_tokens": ["<B>"]},
            pack_seq_len=8)  # fmt: skip


@pytest.mark.parametrize("padding", ["packed", "padded"])
def test_every_row_is_whole_in_one_sample_and_comes_once_in_an_epoch(padding: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    messages = [chat(f"q{i} " + "x" * int(rng.integers(1, 30)), f"a{i}") for i in range(120)]
    messages.append(chat("long", "y" * 300))
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": row} for row in messages])
    folder = pack(tmp_path / "out", [path], supervised={"padding": padding}, shard_tokens=2000)
    summary = read_json(folder / "summary.json")
    assert summary["rows"]["malformed"] == {}
    assert summary["rows"]["truncated"] == 1
    expected = Counter[tuple[int, ...]]()
    rows = encoder(open_tokenizer("bytes"), SEQ_LEN)
    for row in messages:
        ids, targets = encoded(rows, row)
        expected[tuple(token for token, target in zip([*ids, 256], targets, strict=True) if target)] += 1
    found, total = Counter[tuple[int, ...]](), 0
    for split in ("train", "validation"):
        data = TokenDataset(folder / split, seq_len=SEQ_LEN, shuffle_block=1)
        assert len(data.manifest.shards) > (split == "train")
        for sample in (data.sample(len(data) + i) for i in range(len(data))):  # the second epoch
            assert sample.doc_lengths.sum() == SEQ_LEN
            assert padding == "packed" or len(sample.doc_lengths) == 1
            total += len(sample.doc_lengths)
            for start, length in zip(np.cumsum(sample.doc_lengths) - sample.doc_lengths, sample.doc_lengths, strict=True):
                targets = sample.targets[start : start + length]
                assert targets[-1] == IGNORE  # the first token of the next row is no target
                found[tuple(int(token) for token in targets if token != IGNORE)] += 1
        assert data.num_windows() == len(data)
    assert (found, total) == (expected, 121)


def test_samples_cut_no_row_and_leave_little_room() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 129, 3000)
    samples = pack_whole(lengths, 128)
    assert sorted(row for sample in samples for row in sample) == list(range(3000))
    assert max(int(lengths[sample].sum()) for sample in samples) <= 128
    assert len(samples) <= 1.02 * lengths.sum() / 128 + 1
    assert pack_whole(np.array([3, 5, 4, 4]), 8) in ([[0, 1], [2, 3]], [[2, 3], [0, 1]])


def test_the_mask_is_verified_and_other_samples_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": chat(f"q{i}", f"a{i}")} for i in range(30)])
    folder = pack(tmp_path / "out", [path])
    values: dict[str, Any] = {"sources": {"a": {"path": folder}}, "seq_len": SEQ_LEN, "shuffle_block": 1}
    with pytest.raises(UserError, match=r"document_mask=false: .*train has several rows in a sample"):
        open_data(DataConfig.model_validate(values))
    with pytest.raises(UserError, match=r"its samples have 96 tokens .* data\.seq_len=48"):
        open_data(DataConfig.model_validate({**values, "seq_len": 48, "document_mask": True}))
    data = open_data(DataConfig.model_validate({**values, "document_mask": True}))
    assert data.tokenizer.vocab_size == 259
    listed = read_json(folder / "outputs.json")["outputs"]
    mask = folder / "train" / "shard_00000.mask"
    assert listed["train/shard_00000.mask"]["bytes"] == mask.stat().st_size
    damaged = bytearray(mask.read_bytes())
    damaged[5] ^= 1
    mask.write_bytes(damaged)
    with pytest.raises(ShardError, match=r"shard_00000\.mask: sha256 .* the manifest says"):
        data.train.sample(0)
    manifest = data.train.datasets[0].manifest  # type: ignore[attr-defined]
    assert any("shard_00000.mask" in problem for problem in verify_shard(mask.parent, manifest.shards[0], manifest.dtype))


def test_the_template_is_kept_beside_the_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": chat(f"q{i}", f"a{i}")} for i in range(9)])
    folder = pack(tmp_path / "out", [path])
    assert (folder / "tokenizer" / "chat_template.jinja").read_text() == CHATML
    assert "tokenizer/special_tokens.json" in read_json(folder / "outputs.json")["outputs"]


def test_inspect_data_shows_and_verifies_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": chat(f"q{i}", f"a{i}")} for i in range(9)])
    folder = pack(tmp_path / "out", [path])
    shown = "\n".join(inspect(InspectConfig(shards=folder, sample=0)))
    assert "3 rows, 9 of 96 tokens are targets" in shown
    assert re.search(r"row 0: rows\.jsonl:\d, \d+ tokens\n  <\|im_start\|>user\n  q(\d)<\|im_end\|>\n", shown)
    assert re.search(r"<\|im_start\|>assistant\n  ⟦a\d<\|im_end\|>⟧\n  <end of text> x 1\nrow 1", shown), shown
    sound = list(inspect(InspectConfig(shards=folder, verify=True)))
    assert sum("sound" in line for line in sound) == 2
    with pytest.raises(UserError, match="sample=99: the split has"):
        list(inspect(InspectConfig(shards=folder, sample=99)))
