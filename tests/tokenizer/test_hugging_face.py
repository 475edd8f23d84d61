"""tokenizer.json of the Llama, Gemma, Qwen, GPT-NeoX and T5 kinds: ids of `tokenizers`, and what of a text comes back."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megagpt.config import UserError
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.tokenizer.base import token_lengths
from megagpt.tokenizer.bpe import BytePairs, probe_texts
from megagpt.tokenizer.hugging_face import HuggingFaceTokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.reading import CL100K_PATTERN

TEXT = """The quick brown fox jumps over the lazy dog. 1234 and 56.78 are numbers; café, naïve and straße are words.
\tIndented lines,  double  spaces and
    def f(x):
        return x
new lines must all survive. Pack my box with five dozen liquor jugs! The five boxing wizards jump quickly.
"""
HARD = [
    "", " ", "  two  spaces  ", "\n\n\t\r\n", "<s></s><unk><pad>", "<0x0A><0xE2>", "<|endoftext|> is text",
    "<|im_start|>user", "\x00\x01", "日本語 🎉 👩‍👩‍👧", "1234567890", "\u00ad\u200b\u2028", "\U0010ffff", "a\n        b\n  c",
    "<tool_call>{}</tool_call>",
]  # fmt: skip


def byte_level(folder: Path, **parts: Any) -> Tokenizer:
    """GPT-2's kind of tokenizer with other parts."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = parts.pop("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    folder.mkdir()
    return tokenizer


def make(kind: str, folder: Path) -> Path:
    if kind == "neox":
        tokenizer = byte_level(folder, normalizer=normalizers.NFC())
        tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(24, 1, -1)])
    elif kind == "spaces":
        tokenizer = byte_level(folder)
        tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=False) for n in range(24, 1, -1)])
    elif kind == "qwen":
        steps = [
            pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer = byte_level(folder, normalizer=normalizers.NFC(), pre_tokenizer=pre_tokenizers.Sequence(steps))
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    elif kind == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer = byte_level(folder, pre_tokenizer=pre_tokenizers.Sequence(steps))
    elif kind == "t5":
        folder.mkdir()
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()  # pyright: ignore
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator([TEXT] * 4, trainer)
    else:  # llama: a space put in front; gemma: none
        folder.mkdir()
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        replace = normalizers.Replace(" ", "▁")
        first = [normalizers.Prepend("▁")] if kind == "llama" else []
        tokenizer.normalizer = normalizers.Sequence([*first, replace])  # pyright: ignore
        last = [decoders.Strip(" ", 1, 0)] if kind == "llama" else []
        tokenizer.decoder = decoders.Sequence(  # pyright: ignore
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False)
        tokenizer.train_from_iterator(TEXT.replace("\n", " \n ").split("\n"), trainer)
        value = json.loads(tokenizer.to_str())
        value["added_tokens"] = value["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


KINDS = {  # -> lossless, dummy prefix, the reported losses
    "neox": (False, False, "NFC"), "spaces": (True, False, None), "qwen": (False, False, "NFC"), "digits": (True, False, None),
    "llama": (False, True, "Prepend, Replace, a space put in front"),
    "gemma": (True, False, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: make(kind, root / kind) for kind in (*KINDS, "t5")}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(folders: dict[str, Path], kind: str) -> None:
    tokenizer = open_tokenizer(folders[kind])
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    lossless, dummy_prefix, losses = KINDS[kind]
    assert (tokenizer.lossless, tokenizer.dummy_prefix) == (lossless, dummy_prefix)
    if losses:
        assert tokenizer.losses == losses
    reference = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    reference.encode_special_tokens = True
    special = {token["id"] for token in json.loads(reference.to_str())["added_tokens"] if token["special"]}
    assert len(special) >= 2
    for text in [*HARD, TEXT, *probe_texts()[:200]]:
        ids = tokenizer.encode(text)
        if "▁" not in text:
            assert ids == reference.encode(text, add_special_tokens=False).ids, text
        assert special.isdisjoint(ids), text
        kept = unicodedata.normalize("NFC", text) if losses == "NFC" else text
        assert tokenizer.decode(ids) == kept, text
        assert int(token_lengths(tokenizer)[ids].sum()) == len(kept.encode()) + (dummy_prefix and text != ""), text
        assert [piece.tolist() for piece in tokenizer.encode_batch([text, "x", text])] == [ids, tokenizer.encode("x"), ids]


def test_runs_of_spaces_are_vocabulary(folders: dict[str, Path]) -> None:
    for kind in ("neox", "spaces"):
        tokenizer = open_tokenizer(folders[kind])
        ids = tokenizer.encode("a\n        b")
        assert tokenizer.token_bytes()[ids[2]] == b" " * 8
        trained = json.loads((folders[kind] / "tokenizer.json").read_text())["model"]["vocab"]
        assert (tokenizer.eot_id, tokenizer.vocab_size) == (0, len(trained) + 23)
    qwen = open_tokenizer(folders["qwen"])
    assert qwen.token_bytes()[qwen.encode("<tool_call>")[0]] == b"<tool_call>"
    assert len(qwen.encode("<tool_call>")) == 1
    assert len(qwen.encode("<|im_start|>")) > 3


def test_what_nfc_composes_is_lost_and_nothing_else(folders: dict[str, Path]) -> None:
    for kind in ("neox", "qwen"):
        tokenizer = open_tokenizer(folders[kind])
        assert tokenizer.decode(tokenizer.encode("e\u0301 A\u030a")) == "\u00e9 \u00c5"
    assert tokenizer.decode(tokenizer.encode("\ufb01 \u00bd \u3000")) == "\ufb01 \u00bd \u3000"


def test_the_mark_of_a_space_is_no_space(folders: dict[str, Path]) -> None:
    tokenizer = open_tokenizer(folders["gemma"])
    for text in ("a▁b ▁▁ ▁", "▁", "▁ x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_copies_open_as_the_same_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in folders.items() - {("t5", folders["t5"])}:
        tokenizer = open_tokenizer(folder)
        tokenizer.save(tmp_path / kind)
        again = open_tokenizer(tmp_path / kind, saved=True)
        assert (again.fingerprint, again.vocab_size, again.eot_id) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eot_id,
        )
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
    renamed = tmp_path / "renamed.json"
    renamed.write_bytes((folders["qwen"] / "tokenizer.json").read_bytes())
    open_tokenizer(renamed).save(tmp_path / "copy")
    assert open_tokenizer(tmp_path / "copy").fingerprint == open_tokenizer(folders["qwen"]).fingerprint


def test_a_copy_of_release_0_1_keeps_added_tokens_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """That release took the runs of spaces for special tokens; models trained with it keep its ids."""
    today = open_tokenizer(folders["spaces"])
    earlier = open_tokenizer(folders["spaces"], saved=True)
    assert isinstance(earlier, BytePairs)
    runs = {i for i, piece in enumerate(today.token_bytes()) if piece.strip() == b"" and len(piece) > 1}
    assert runs & {*today.encode("a\n                  b")}
    assert earlier.encode("a\n                  b") != today.encode("a\n                  b")
    assert earlier.fingerprint != today.fingerprint
    with pytest.raises(UserError, match="without a normalizer"):
        open_tokenizer(folders["qwen"], saved=True)


def test_lossy_tokenizers_are_refused_by_name_unless_allowed(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": f"{i}", "text": f"{i} cafe\u0301", "source": "a"}) + "\n" for i in range(8)))
    config, execution = TokenizeConfig(validation_fraction=0), Execution(executor="inline")
    with pytest.raises(UserError, match=r"it rewrites or drops text \(NFC\); require_lossless=false"):
        pack_documents([source], tmp_path / "shards", folders["qwen"], config, execution)
    allowed = config.model_copy(update={"require_lossless": False})
    summary = pack_documents([source], tmp_path / "shards", folders["qwen"], allowed, execution)
    assert [counts["documents"] for counts in summary.splits.values() if counts["documents"]] == [8]
    assert (
        open_tokenizer(tmp_path / "shards" / "tokenizer", saved=True).fingerprint == open_tokenizer(folders["qwen"]).fingerprint
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
            r"decoder \['WordPiece'\] is not supported: ids must stand for bytes",
        ),
        ({"decoder": None}, "decoder None"),
        ({"model": {"type": "BPE"}}, r"not a Hugging Face tokenizer\.json"),
    ],
)
def test_what_cannot_be_read(folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    value = json.loads((folders["qwen"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="encoder=fastokens only encodes GPT-2's byte pairs"):
        open_tokenizer(folders["qwen"], "fastokens")


def test_a_special_token_that_text_can_spell_is_refused(folders: dict[str, Path]) -> None:
    """Unigram models, T5's say, find the names of their special tokens in text."""
    with pytest.raises(UserError, match="the text '<pad>' is encoded as a special id: the two cannot be told apart"):
        open_tokenizer(folders["t5"])


def test_long_runs_of_spaces(folders: dict[str, Path]) -> None:
    for kind in ("qwen", "neox", "gemma"):
        tokenizer = open_tokenizer(folders[kind])
        text = "a" + "\n" * 200_000 + " b" + " " * 100_000
        assert tokenizer.decode(tokenizer.encode(text)) == text
