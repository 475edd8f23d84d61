"""Rank files: published ones are known with pattern and ids, others need a pattern, saved ones stay as they were trained."""

import base64
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megagpt.checkpoint.tokenizers import keep_tokenizer, tokenizer_of
from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.tokenizer.bpe import BytePairs, probe_texts
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.reading import CL100K_PATTERN, GPT2_PATTERN, KNOWN, O200K_PATTERN, PATTERNS, Reading, read_reading

TEXTS = ["I'LL pay 12345 dollars.\r\n\r\n  x = 1;;\n", "DON'T", "naïve Straße\t\t\tend", "a  b\n\n\nc   ", "<|endoftext|>"]


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A rank file of the 256 bytes and a few merges, published by nobody."""
    pieces = [bytes([i]) for i in range(256)] + [b"12", b"34", b"1234", b"12345", b"'L", b"\r\n", b"\r\n\r\n"]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + f" {i}\n".encode() for i, piece in enumerate(pieces)))
    return path


def first_fingerprint(path: Path) -> str:
    """As release 0.1 computed it."""
    return hashlib.sha256(b"bpe" + hashlib.sha256(path.read_bytes()).digest()).hexdigest()


def test_an_unknown_rank_file_needs_a_pattern(ranks: Path) -> None:
    with pytest.raises(UserError, match=r"own\.tiktoken: .* none of r50k, .*: give tokenize\.pattern \(gpt2, cl100k, o200k"):
        open_tokenizer(ranks)
    with pytest.raises(UserError, match=r"own\.tiktoken: tokenize\.pattern='\(': "):
        open_tokenizer(ranks, pattern="(")
    pieces = {
        name: [len(open_tokenizer(ranks, pattern=name).encode(text)) for text in ("12345", "\r\n\r\n")] for name in PATTERNS
    }
    assert pieces == {"gpt2": [1, 1], "cl100k": [4, 1], "o200k": [4, 1], "llama3": [4, 1]}
    assert open_tokenizer(ranks, pattern=CL100K_PATTERN).fingerprint == open_tokenizer(ranks, pattern="cl100k").fingerprint
    assert open_tokenizer(ranks, pattern="gpt2").fingerprint == first_fingerprint(ranks)


def test_a_pattern_that_drops_text_is_not_lossless(ranks: Path) -> None:
    assert open_tokenizer(ranks, pattern=r"\p{L}+|\s+").lossless is False
    assert open_tokenizer(ranks, pattern=r"\p{L}+|\P{L}+").lossless is True


def test_a_saved_copy_is_read_as_it_was_made(ranks: Path, tmp_path: Path) -> None:
    for name in PATTERNS:
        tokenizer = open_tokenizer(ranks, pattern=name)
        tokenizer.save(tmp_path / name)
        again = open_tokenizer(tmp_path / name, saved=True)
        assert again.fingerprint == tokenizer.fingerprint
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert not (tmp_path / "gpt2" / "reading.json").exists()
    assert read_reading(tmp_path / "cl100k" / "reading.json") == Reading(pattern=CL100K_PATTERN)
    (tmp_path / "cl100k" / "reading.json").write_text('{"patern": ""}')
    with pytest.raises(UserError, match=r"reading\.json: not how a tokenizer is read"):
        open_tokenizer(tmp_path / "cl100k")


def test_what_release_0_1_saved_beside_shards_and_runs_keeps_its_ids(ranks: Path, tmp_path: Path) -> None:
    expected = open_tokenizer(ranks, pattern="gpt2")
    for place, beside in (("shards", "train/manifest.json"), ("run", "checkpoints/step_00000001/state.json")):
        folder = tmp_path / place / "tokenizer"
        folder.mkdir(parents=True)
        shutil.copyfile(ranks, folder / "own.tiktoken")
        (tmp_path / place / beside).parent.mkdir(parents=True)
        (tmp_path / place / beside).write_text("{}")
        for tokenizer in (open_tokenizer(folder, saved=True), open_tokenizer(folder), open_tokenizer(folder, pattern="o200k")):
            assert tokenizer.fingerprint == first_fingerprint(ranks)
            assert [tokenizer.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    assert tokenizer_of(tmp_path / "run", first_fingerprint(ranks)).encode("12345") == [259]
    other = keep_tokenizer(tmp_path / "run", open_tokenizer(ranks, pattern="cl100k"))
    assert other.name.startswith("tokenizer_")
    assert tokenizer_of(tmp_path / "run", open_tokenizer(other).fingerprint).encode("12345") == [
        256,
        ord("3"),
        ord("4"),
        ord("5"),
    ]


def test_merges_beside_the_settings_of_another_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    fast.train_from_iterator(["aaaabbbb"], trainer)
    fast.model.save(str(tmp_path))
    default = open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(
        UserError, match=r"vocab\.json: belongs to a Qwen2Tokenizer, and vocab\.json with merges\.txt do not say"
    ):
        open_tokenizer(tmp_path)
    given = open_tokenizer(tmp_path, pattern="llama3")
    assert given.fingerprint != default.fingerprint
    given.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == given.fingerprint
    assert open_tokenizer(tmp_path, saved=True).fingerprint == default.fingerprint


def test_known_readings_are_those_of_tiktoken() -> None:
    """tiktoken's own table names the hashes; its patterns with possessive marks cut as ours do."""
    import tiktoken
    from tiktoken_ext import openai_public

    names = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
    source = Path(openai_public.__file__).read_text()
    ranks = {bytes([i]): i for i in range(256)}
    for name, (digest, reading) in zip(names, KNOWN.items(), strict=False):
        assert f'expected_hash="{digest}"' in source[source.index(f"def {name}()") :].split("\ndef ")[0], name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
            theirs = getattr(openai_public, name)()
        ours = theirs["special_tokens"] if reading.special else {}
        assert reading.special == ours, name
        assert (reading.eot_id or 50256) == theirs["special_tokens"]["<|endoftext|>"]
        split = [
            tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            for pattern in (reading.pattern, theirs["pat_str"])
        ]
        for text in (*TEXTS, *probe_texts()):
            assert split[0].encode_ordinary(text) == split[1].encode_ordinary(text)


def test_llama_3_begins_and_ends_texts() -> None:
    reading = KNOWN["82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"]
    assert (reading.bos_id, reading.eot_id, reading.vocab_size, len(reading.special)) == (128_000, 128_001, 128_256, 256)
    assert [reading.special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")] == [
        128_006,
        128_007,
        128_009,
    ]
    assert reading.special["<|reserved_special_token_250|>"] == 128_255
    assert (reading.pattern, GPT2_PATTERN in (CL100K_PATTERN, O200K_PATTERN)) == (CL100K_PATTERN, False)


def test_a_rank_file_named_tokenizer_model_is_no_sentencepiece(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copyfile(ranks, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model: a rank file does not say how text is cut"):
        open_tokenizer(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(
        KNOWN, digest, Reading(pattern=CL100K_PATTERN, eot_id=301, bos_id=300, vocab_size=320, special={"<e>": 301})
    )
    tokenizer = open_tokenizer(path)
    assert isinstance(tokenizer, BytePairs)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eot_id, tokenizer.eos_ids) == (320, 300, 301, (301,))
    tokenizer.save(tmp_path / "saved")
    monkeypatch.undo()
    again = open_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.bos_id, again.vocab_size) == (tokenizer.fingerprint, 300, 320)
    assert read_json(tmp_path / "saved" / "reading.json")["special"] == {"<e>": 301}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "published", "tokens", "eot_id", "vocab_size"),
    [
        ("cl100k_base", "tokens_gpt_3.5_turbo.json", 5_584, 100_257, 100_277),
        ("p50k_base", "tokens_p50k_base.json", 7_230, 50_256, 50_281),
    ],
)
def test_published_ids(shared_data: Path, name: str, published: str, tokens: int, eot_id: int, vocab_size: int) -> None:
    folder = shared_data / "tokenizer"
    tokenizer = open_tokenizer(folder / "other" / f"{name}.tiktoken")
    text = (folder / "gpt2" / "lib.rs.txt").read_text(encoding="utf-8")
    expected = json.loads((folder / "other" / published).read_text())
    assert len(expected) == tokens
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert (tokenizer.eot_id, tokenizer.vocab_size, tokenizer.lossless) == (eot_id, vocab_size, True)
    assert tokenizer.decode(tokenizer.encode("<|endofprompt|>")) == "<|endofprompt|>"


@pytest.mark.realdata
def test_fingerprint_of_r50k_is_that_of_release_0_1(shared_data: Path) -> None:
    path = shared_data / "tokenizer/gpt2/r50k_base.tiktoken"
    assert open_tokenizer(path).fingerprint == first_fingerprint(path)
