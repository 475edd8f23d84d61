"""Tokenizers: published ids, and decode(encode(s)) == s for every string and every kind."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import UserError
from megagpt.tokenizer import bpe as byte_pairs
from megagpt.tokenizer.base import Tokenizer, token_lengths
from megagpt.tokenizer.bpe import BytePairs, _open_fastokens, ranks_from_tokenizer_json
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.sentencepiece import SentencePiece, train_sentencepiece

TEXT = """The quick brown fox jumps over the lazy dog. 1234 and 56.78 are numbers; café, naïve and straße are words.
\tIndented lines,  double  spaces and
new lines must all survive. Pack my box with five dozen liquor jugs! The five boxing wizards jump quickly.
"""
HARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t\r\n",
    "a\u2581b \u2581\u2581 \u2581",
    "\u2581",
    "<s></s><unk><pad>",
    "<0x0A><0xE2>",
    "<|endoftext|> is text",
    "\x00\x01",
    "\ufeffbom \ufb01 \u00bd \u3000",
    "日本語 🎉 👩‍👩‍👧",
    "e\u0301 \u00e9",
    "1234567890",
    "\u00ad\u200b\u2028",
    "\U0010ffff",
]
characters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\u2581 \n\t<>|_0a"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SentencePiece]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "bpe": train_sentencepiece([TEXT] * 4, folder / "bpe", vocab_size=450),
        "unigram": train_sentencepiece([TEXT] * 4, folder / "unigram", vocab_size=340, model_type="unigram"),
    }


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE made by Hugging Face's library, with its own files: tokenizer.json, vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def every_kind(trained: dict[str, SentencePiece], small_bpe: Path) -> list[Tokenizer]:
    return [open_tokenizer("bytes"), trained["bpe"], trained["unigram"], open_tokenizer(small_bpe)]


def test_hard_strings_round_trip(trained: dict[str, SentencePiece], small_bpe: Path) -> None:
    for tokenizer in every_kind(trained, small_bpe):
        assert tokenizer.lossless
        for text in [*HARD, "".join(HARD), TEXT]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text, (tokenizer.kind, text)
            assert tokenizer.eot_id not in ids, (tokenizer.kind, text)
            assert max(ids, default=0) < tokenizer.vocab_size
            assert int(token_lengths(tokenizer)[ids].sum()) == len(text.encode())


def test_a_million_blanks_round_trip(small_bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(small_bpe)
    text = "a" + "\n" * 1_500_000 + " b" + " " * 200_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    short = "a \n\n\t b  c\u00a0\u00a0\u00a0 d   "
    expected = tokenizer.encode(short)
    monkeypatch.setattr(byte_pairs, "_LONG_BLANKS", re.compile(r"[^\S\x1c-\x1f]{2,}"))
    assert tokenizer.encode(short) == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(characters, max_size=60))
def test_any_string_round_trips(trained: dict[str, SentencePiece], small_bpe: Path, text: str) -> None:
    for tokenizer in every_kind(trained, small_bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert [piece.tolist() for piece in tokenizer.encode_batch([text, "x", text])] == [ids, tokenizer.encode("x"), ids]


def test_batches_are_uint32(trained: dict[str, SentencePiece], small_bpe: Path) -> None:
    for tokenizer in every_kind(trained, small_bpe):
        assert {piece.dtype for piece in tokenizer.encode_batch(["a b", ""])} == {np.dtype("uint32")}


def test_saved_copies_open_as_the_same_tokenizer(trained: dict[str, SentencePiece], small_bpe: Path, tmp_path: Path) -> None:
    for number, tokenizer in enumerate(every_kind(trained, small_bpe)):
        directory = tmp_path / str(number)
        tokenizer.save(directory)
        tokenizer.save(directory)
        again = open_tokenizer(directory)
        assert (again.kind, again.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
        assert (again.vocab_size, again.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        again.save(directory)
    assert len({t.fingerprint for t in every_kind(trained, small_bpe)}) == 4


def test_bytes_are_bytes() -> None:
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0x41, 256, 0x42, 0xFF]) == "AB\ufffd"


def test_training_is_deterministic_and_newlines_stand_alone(tmp_path: Path) -> None:
    models = [train_sentencepiece([TEXT] * 4, tmp_path / name, vocab_size=420) for name in "ab"]
    unigrams = [train_sentencepiece([TEXT] * 4, tmp_path / name, vocab_size=340, model_type="unigram") for name in "cd"]
    assert unigrams[0].fingerprint == unigrams[1].fingerprint
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].vocab_size == 420
    newlines = [piece for piece in models[0].token_bytes() if b"\n" in piece and piece != b"\n"]
    assert newlines == []
    assert [models[0].token_bytes()[i] for i in models[0].encode("25")] == [b"2", b"5"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["tokenizer.model"]


def test_a_document_of_one_long_line_is_trained_on(tmp_path: Path) -> None:
    # SentencePiece would skip a line above its limit without a word.
    word = "zyzzogeton "
    tokenizer = train_sentencepiece([word * 50_000], tmp_path, vocab_size=300)
    assert len(tokenizer.encode(word.strip())) <= 2


def test_a_vocabulary_that_does_not_suit_the_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer: vocab_size=90000: SentencePiece cannot train it"):
        train_sentencepiece([TEXT], tmp_path, vocab_size=90_000, model_type="unigram")
    assert list(tmp_path.iterdir()) == []


def test_hugging_face_library_gives_the_same_ids(small_bpe: Path) -> None:
    from tokenizers import Tokenizer as Reference

    reference, tokenizer = Reference.from_file(str(small_bpe / "tokenizer.json")), open_tokenizer(small_bpe)
    assert tokenizer.eot_id == reference.token_to_id("<|endoftext|>")
    for text in [*HARD, TEXT, "lazy foxes jumping quickly over wizards' boxes, they're " * 3]:
        if "<|endoftext|>" not in text:
            assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "without a normalizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "is not supported"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space=true"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}, "254 of the 256 single bytes"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}, "a merge does not fit"),
        ({"model": {"type": "BPE", "vocab": {"日": 0}, "merges": []}}, "the character '日' does not stand for a byte"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "a b": 1}, "merges": []}}, "the character ' ' does not stand for a byte"),
        (
            {"added_tokens": [{"id": 0, "content": "a", "special": False}]},
            "added tokens that are neither special nor byte pairs",
        ),
        ({"model": {"type": "BPE"}}, r"not a Hugging Face tokenizer\.json"),
    ],
)
def test_tokenizer_json_that_tiktoken_cannot_express(tmp_path: Path, small_bpe: Path, change: dict, message: str) -> None:
    value = json.loads((small_bpe / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        ranks_from_tokenizer_json(tmp_path / "tokenizer.json")


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    (tmp_path / "x.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0\nnonsense\n")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("x.model", "not a SentencePiece model"),
        ("x.tiktoken", "line 2: expected"),
        ("x.bin", "must be `bytes`"),
        ("empty", "holds no"),
        ("absent", "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            open_tokenizer(tmp_path / name, pattern="gpt2")


def test_fastokens_gives_the_same_ids(small_bpe: Path) -> None:
    reference, fast = open_tokenizer(small_bpe), open_tokenizer(small_bpe, "fastokens")
    texts = [*HARD, TEXT, "<|endoftext|>"]
    assert [ids.tolist() for ids in fast.encode_batch(texts)] == [reference.encode(text) for text in texts]
    assert fast.encode_batch([]) == []
    assert fast.fingerprint == reference.fingerprint


def test_fastokens_is_refused_when_its_ids_differ(small_bpe: Path, tmp_path: Path) -> None:
    # Another pattern than GPT-2's cannot be given to it.
    value = json.loads((small_bpe / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+|[^\s\p{L}]+"}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, "pre_tokenizer": pre_tokenizer}))
    assert open_tokenizer(tmp_path).decode(open_tokenizer(tmp_path).encode(TEXT)) == TEXT
    with pytest.raises(UserError, match="encoder=fastokens only encodes GPT-2's byte pairs"):
        open_tokenizer(tmp_path, "fastokens")
    fast = BytePairs(ranks_from_tokenizer_json(small_bpe / "tokenizer.json"), [small_bpe / "tokenizer.json"], "fastokens")
    other = {**value, "model": {**value["model"], "merges": value["model"]["merges"][-1:]}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    fast._unchecked = _open_fastokens(ranks_from_tokenizer_json(tmp_path / "other.json", saved=True), tmp_path / "other.json")
    with pytest.raises(UserError, match="give different ids: use encoder=tiktoken"):
        fast.encode_batch([TEXT])


@pytest.mark.slow
@pytest.mark.realdata
def test_fastokens_agrees_on_every_character_of_unicode(shared_data: Path) -> None:
    folder = shared_data / "tokenizer" / "gpt2"
    reference, fast = open_tokenizer(folder), open_tokenizer(folder, "fastokens")
    for first in range(0, 0x110000, 4096):
        points = [point for point in range(first, first + 4096) if not 0xD800 <= point < 0xE000]
        texts = [f"a{c}b{c}{c}1{c} {c}x{c} \n{c}'s" for c in map(chr, points)]
        found, expected = fast.encode_batch(texts), reference.encode_batch(texts)
        assert [hex(p) for p, a, b in zip(points, found, expected, strict=True) if a.tolist() != b.tolist()] == []
    text = (folder / "lib.rs.txt").read_text(encoding="utf-8")
    assert fast.encode_batch([text])[0].tolist() == json.loads((folder / "tokens_gpt2.json").read_text())


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["encoder.json", "r50k_base.tiktoken"])
def test_published_gpt2_ids(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizer" / "gpt2"
    tokenizer = open_tokenizer(folder / name)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50_257, 50_256)
    expected = json.loads((folder / "tokens_gpt2.json").read_text())
    text = (folder / "lib.rs.txt").read_text(encoding="utf-8")
    assert len(expected) == 11_378
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    cases = (folder / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-gpt-2.gguf.out").read_text().split("\n")
    assert [tokenizer.encode(case) for case in cases] == [[int(i) for i in line.split()] for line in lines[: len(cases)]]
    assert len(cases) == 47
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


@pytest.mark.realdata
def test_published_gpt2_counts_of_shakespeare(shared_data: Path) -> None:
    text = (shared_data / "lm/tinyshakespeare/input.txt").read_text()
    tokenizer = open_tokenizer(shared_data / "tokenizer/gpt2/encoder.json")
    cut = int(len(text) * 0.9)
    assert [len(ids) for ids in tokenizer.encode_batch([text[:cut], text[cut:]])] == [301_966, 36_059]


@pytest.mark.realdata
def test_a_lossy_model_says_so(shared_data: Path) -> None:
    # Unigram, NFKC, no byte fallback: it opens, as a published model may be wanted all the same.
    tokenizer = open_tokenizer(shared_data / "tokenizer/sentencepiece/test_model.model")
    assert (tokenizer.lossless, tokenizer.vocab_size) == (False, 1000)
    digest = hashlib.sha256((shared_data / "tokenizer/sentencepiece/test_model.model").read_bytes()).digest()
    assert tokenizer.fingerprint == hashlib.sha256(b"sentencepiece" + digest).hexdigest()


@pytest.mark.realdata
def test_trained_on_its_fixture_text(shared_data: Path, tmp_path: Path) -> None:
    text = (shared_data / "tokenizer/sentencepiece/botchan.txt").read_text(encoding="utf-8")
    tokenizer = train_sentencepiece([text], tmp_path, vocab_size=4000)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 3.3
