"""Exported tokenizers give the ids of ours, in `tokenizers` and in transformers; imported ones keep their special ids."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError, import_transformers
from megagpt.convert.tokenizers import (
    HARD_TEXTS,
    differing_texts,
    export_tokenizer,
    import_tokenizer,
    recover_merges,
    sentencepiece_json,
)
from megagpt.files import read_json, write_json
from megagpt.tokenizer.bpe import byte_characters
from megagpt.tokenizer.extended import extend
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.reading import CL100K_PATTERN
from megagpt.tokenizer.sentencepiece import SentencePiece, train_sentencepiece
from megagpt.tokenizer.special_ids import write_special_ids

TEXT = """The quick brown fox jumps over the lazy dog. 1234 and 56.78 are numbers; café, naïve and straße are words.
\tIndented lines,  double  spaces and
new lines must all survive. Pack my box with five dozen liquor jugs! The five boxing wizards jump quickly.
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per kind of tokenizer."""
    import sentencepiece
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    root = tmp_path_factory.mktemp("tokenizers")
    found = {name: root / name for name in ("bytes", "bpe", "unigram", "llama", "json", "gpt2", "tiktoken")}
    for folder in found.values():
        folder.mkdir()
    (found["bytes"] / "bytes.tokenizer").touch()
    train_sentencepiece([TEXT] * 4, found["bpe"], vocab_size=450)
    train_sentencepiece([TEXT] * 4, found["unigram"], vocab_size=340, model_type="unigram")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (found["llama"] / "tokenizer.model").write_bytes(model.getvalue())
    write_special_ids(found["llama"], eos_ids=[2, 1], bos_id=1)
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    fast.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], **options))
    fast.save(str(found["json"] / "tokenizer.json"))
    fast.model.save(str(found["gpt2"]))
    return found


def ranks_of(folder: Path) -> dict[bytes, int]:
    to_bytes = {ord(character): value for character, value in byte_characters().items()}
    vocab = read_json(folder / "vocab.json")
    return {piece.translate(to_bytes).encode("latin-1"): i for piece, i in vocab.items() if piece != "<|endoftext|>"}


@pytest.mark.parametrize("kind", ["bytes", "bpe", "llama", "json", "gpt2"])
def test_exported_tokenizers_give_the_same_ids(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folders[kind])
    tmp_path.joinpath("run").mkdir()
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    notes = export_tokenizer(tokenizer, tmp_path / "run", tmp_path, seq_len=64)
    assert any("special token" in note for note in notes)
    loaded = import_transformers().AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (tokenizer.eot_id, tokenizer.bos_id)
    assert loaded.model_max_length == 64
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in (*HARD_TEXTS, TEXT):
        ids = tokenizer.encode(text)
        assert loaded(text)["input_ids"] == [*begin, *ids], text
        assert loaded.decode(ids) == tokenizer.decode(ids), text


def test_what_tokenizer_json_cannot_express_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    unigram = open_tokenizer(folders["unigram"])
    (note,) = export_tokenizer(unigram, folders["unigram"], tmp_path / "unigram", seq_len=64)
    assert "tokenizer.json is not written (only BPE with byte fallback has equal ids there)" in note
    assert [path.name for path in (tmp_path / "unigram").iterdir()] == ["tokenizer.model"]
    assert open_tokenizer(tmp_path / "unigram").encode(TEXT) == unigram.encode(TEXT)
    (tmp_path / "bpe").mkdir()
    notes = export_tokenizer(open_tokenizer(folders["bpe"]), folders["bpe"], tmp_path / "bpe", seq_len=64)
    assert "U+2581" in notes[0]


def test_an_export_with_other_ids_is_refused(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagpt.convert import tokenizers

    def without_the_last_merge(tokenizer: SentencePiece) -> Any:
        value, reason = sentencepiece_json(tokenizer)
        assert value is not None
        value["model"]["merges"] = value["model"]["merges"][:20]
        return value, reason

    monkeypatch.setattr(tokenizers, "sentencepiece_json", without_the_last_merge)
    with pytest.raises(ConversionError, match=r"tokenizer.json gives other ids for \d+ test strings"):
        export_tokenizer(open_tokenizer(folders["bpe"]), folders["bpe"], tmp_path, seq_len=64)


def test_merges_are_found_again_from_ranks(folders: dict[str, Path]) -> None:
    ranks = ranks_of(folders["gpt2"])
    merges = [line.split(" ") for line in (folders["gpt2"] / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] if line]
    to_bytes = {ord(character): value for character, value in byte_characters().items()}
    expected = [tuple(part.translate(to_bytes).encode("latin-1") for part in merge) for merge in merges]
    assert list(recover_merges(ranks)) == expected
    broken = {piece: rank for piece, rank in ranks.items() if piece != expected[0][0] + expected[0][1]}
    with pytest.raises(UserError, match="is not made by merges of lower ranks"):
        list(recover_merges(broken))


SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any], int | None, tuple[int, ...]]] = [
    # tokenizer, tokenizer_config.json, config.json -> bos_id, eos_ids
    ("llama", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}, {}, 1, (2,)),
    ("llama", {"add_bos_token": False, "bos_token": "<s>", "eos_token": {"content": "</s>"}}, {}, None, (2,)),
    ("llama", {"add_bos_token": True}, {"bos_token_id": 1, "eos_token_id": [2, 1]}, 1, (2, 1)),
    ("json", {"eos_token": "<|endoftext|>"}, {"bos_token_id": 0, "eos_token_id": [0, 7]}, None, (0, 7)),
    ("json", {}, {"eos_token_id": 5}, None, (5,)),
    ("bytes", {}, {}, None, (256,)),
]


@pytest.mark.parametrize(("kind", "settings", "config", "bos_id", "eos_ids"), SETTINGS)
def test_special_ids_of_an_import(
    folders: dict[str, Path], kind: str, settings: dict[str, Any], config: dict[str, Any], bos_id: int | None,
    eos_ids: tuple[int, ...], tmp_path: Path,
) -> None:  # fmt: skip
    source = shutil.copytree(folders[kind], tmp_path / "source")
    (source / "special_ids.json").unlink(missing_ok=True)
    settings = {**settings, "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = import_tokenizer(source, None, tmp_path / "ours")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.eot_id) == (bos_id, eos_ids, eos_ids[0])
    assert (tmp_path / "ours" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_special_tokens_of_chats_come_back(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Else a tuning that begins with the import would take their trained rows for new ones."""
    base = open_tokenizer(folders[kind])
    chat = extend(base, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"], "{% generation %}{% endgeneration %}")
    source = tmp_path / "source"
    source.mkdir()
    export_tokenizer(chat, folders[kind], source, seq_len=64)
    for rows, vocab_size, ends in ((chat.vocab_size, chat.vocab_size, chat.eos_ids), (base.vocab_size, None, base.eos_ids)):
        write_json(source / "config.json", {"vocab_size": rows, "eos_token_id": list(ends)})
        tokenizer = import_tokenizer(source, None, tmp_path / f"ours_{rows}")
        if kind == "bpe":
            assert tokenizer.vocab_size == (vocab_size or base.vocab_size)
            assert tokenizer.eos_ids == ends
        else:  # opened from tokenizer.json, which holds them
            assert tokenizer.vocab_size == chat.vocab_size
        extended = extend(tokenizer, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"], None)
        assert extended.tokens == chat.tokens  # a tuning gives them no other ids
        assert tokenizer.encode(TEXT) == base.encode(TEXT)


def test_a_post_processor_tells_that_texts_begin_with_a_token(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["json"], tmp_path / "source")
    value = read_json(source / "tokenizer.json")
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    token = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<|endoftext|>": token}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    value["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    (source / "tokenizer.json").write_text(json.dumps(value))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    assert import_tokenizer(source, None, tmp_path / "ours").bos_id == 0


def test_tokenizer_json_decides_where_files_disagree(folders: dict[str, Path], tmp_path: Path) -> None:
    """vocab.json and merges.txt say nothing of how text is cut; tokenizer.json beside them does. So does it beside a .model."""
    digits = {"type": "Digits", "individual_digits": True}
    value = read_json(folders["json"] / "tokenizer.json")
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, value["pre_tokenizer"]]}
    for kind in ("gpt2", "bpe"):
        source = shutil.copytree(folders[kind], tmp_path / kind)
        (source / "tokenizer.json").write_text(json.dumps(value))
        tokenizer = import_tokenizer(source, None, tmp_path / "ours" / kind)
        assert tokenizer.kind == "tokenizer.json"
        assert differing_texts(tokenizer, source / "tokenizer.json") == []
        assert sorted(path.name for path in (tmp_path / "ours" / kind).iterdir()) == [
            "reading.json", "special_ids.json", "tokenizer.json"
        ]  # fmt: skip
        assert tokenizer.encode("1234") != open_tokenizer(folders[kind]).encode("1234")


def test_a_folder_like_qwen_s_is_imported_and_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    """vocab.json and merges.txt beside a tokenizer.json with another pattern, NFC and added tokens, some of them special."""
    source = shutil.copytree(folders["gpt2"], tmp_path / "source")
    value = read_json(folders["json"] / "tokenizer.json")
    split = {"type": "Split", "pattern": {"Regex": CL100K_PATTERN}, "behavior": "Isolated", "invert": False}
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**value["pre_tokenizer"], "use_regex": False}]}
    value["normalizer"] = {"type": "NFC"}
    size, flags = len(value["model"]["vocab"]), {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, (name, special) in enumerate((("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False))):
        value["added_tokens"].append({"id": size + i, "content": name, "special": special, **flags})
    (source / "tokenizer.json").write_text(json.dumps(value))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [size + 1, 0]}))
    tokenizer = import_tokenizer(source, None, tmp_path / "ours")
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.lossless) == ((size + 1, 0), None, False)
    assert tokenizer.encode("<tool_call>") == [size + 2]
    assert size not in tokenizer.encode("<|im_start|>user")
    notes = export_tokenizer(tokenizer, tmp_path / "ours", tmp_path / "theirs", seq_len=64)
    assert any("special token" in note for note in notes)
    loaded = import_transformers().AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert loaded.eos_token_id == size + 1
    for text in (*HARD_TEXTS, TEXT, "<tool_call>{}"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text), text


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no .*tokenizer=PATH names another"):
        import_tokenizer(tmp_path, None, tmp_path / "ours")
