"""llama2.c: stories260K imported gives its expected text, here and in transformers; files that are none are refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_text import run as generate_text

from megagpt.checkpoint.load_model import load_model
from megagpt.config import UserError
from megagpt.convert import llama2c
from megagpt.convert.compare_logits import ConversionError, import_transformers, sample_ids
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.convert.llama2c import llama2c_logits, load_llama2c, read_llama2c
from megagpt.generate.generate_text import GenerateConfig


def write_llama2c(path: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A small random model: 2 layers, 4 heads of 4 that share 2 of keys and values."""
    hidden, mlp, layers, heads, kv_heads, vocab, seq_len = 16, 24, 2, 4, 2, 270, 300
    sizes = [vocab * hidden, layers * hidden, layers * hidden**2, 2 * layers * hidden**2 // 2, layers * hidden**2]
    sizes += [layers * hidden, 3 * layers * mlp * hidden, hidden, seq_len * hidden // heads, 0 if tied else vocab * hidden]
    header = struct.pack("<7i", hidden, mlp, layers, heads, kv_heads, vocab if tied else -vocab, seq_len)
    path.write_bytes(header + np.random.default_rng(seed).normal(0, 0.5, sum(sizes)).astype(np.float32).tobytes())
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_what_its_file_says(tmp_path: Path, tied: bool) -> None:
    path = write_llama2c(tmp_path / "model.bin", tied=tied)
    import_model(ImportConfig(source=path, run_dir=tmp_path / "run", tokenizer=bytes_tokenizer(tmp_path)))
    ids = sample_ids(257, 40)
    with torch.no_grad():
        logits = load_model(tmp_path / "run").model(ids)
    expected = llama2c_logits(read_llama2c(path), ids)
    # other orders of fp32 sums
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert expected.abs().max() > 3


def bytes_tokenizer(folder: Path) -> Path:
    path = folder / "bytes.tokenizer"
    path.touch()
    return path


def test_rotation_of_neighbours_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = llama2c.parameters_of

    def as_they_are(source: Any) -> Any:
        for name, tensor in parameters(source):
            layer = int(name.split(".")[1]) if name.startswith("blocks") else 0
            yield name, source.blocks["query"][layer] if name.endswith("query.weight") else tensor

    path = write_llama2c(tmp_path / "model.bin")
    monkeypatch.setattr(llama2c, "parameters_of", as_they_are)
    with pytest.raises(ConversionError, match=r"model.bin: logits differ by"):
        import_model(ImportConfig(source=path, run_dir=tmp_path / "run", tokenizer=bytes_tokenizer(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:20], "20 bytes: not a model of llama2.c"),
        (lambda data: data[:-4], "a model of llama2.c with this header has"),
        (lambda data: data + b"1234", "a model of llama2.c with this header has"),
        (lambda data: b"PK\x03\x04" + data[4:], "llama2.c"),
        (lambda data: b"\x80\x02}q" + data[4:], "llama2.c"),
        (lambda data: struct.pack("<i", 0) + data[4:], "not a model of llama2.c (format v0): its header is (0,"),
    ],
)
def test_other_files_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path = write_llama2c(tmp_path / "model.bin")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as raised:
        import_model(ImportConfig(source=path, run_dir=tmp_path / "run", tokenizer=bytes_tokenizer(tmp_path)))
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x00\x00\x00" + struct.pack("<fi", 0.0, 100) + b"abc", "it ends within token 0"),
        (b"\x00\x00\x00\x00" + struct.pack("<fi", 0.0, 2) + b"\xff\xff", "not a tokenizer of llama2.c"),
        (b"\x00\x00\x00\x00" + struct.pack("<fi", 0.0, 1) + b"a", "1 tokens: a tokenizer of llama2.c has 259 or more"),
    ],
)
def test_other_tokenizers_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(data)
    with pytest.raises(UserError, match=message):
        import_model(
            ImportConfig(
                source=write_llama2c(tmp_path / "m.bin"), run_dir=tmp_path / "run", tokenizer=tmp_path / "tokenizer.bin"
            )
        )


def test_a_tokenizer_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer: name it"):
        import_model(ImportConfig(source=write_llama2c(tmp_path / "m.bin"), run_dir=tmp_path / "run"))


@pytest.mark.realdata
def test_stories260k_gives_its_expected_text(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_data / "model"
    expected = (folder / "stories260K.expected.txt").read_text(encoding="utf-8")
    source, words = folder / "stories260K.bin", folder / "tok512.bin"
    import_model(ImportConfig(source=source, run_dir=tmp_path / "run", tokenizer=words))
    generate_text(GenerateConfig(run_dir=tmp_path / "run", prompt="", max_tokens=200, temperature=0, device="cpu"))
    assert capsys.readouterr().out == expected + "\n"  # the tool ends its output with a line break
    assert load_llama2c(source).config == load_model(tmp_path / "run").model_config

    out = export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "out", dtype="fp32"))
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("", return_tensors="pt").input_ids.long()
    assert ids.tolist() == [[1]]
    made = model.generate(ids, do_sample=False, max_new_tokens=200)
    assert tokenizer.decode(made[0], skip_special_tokens=True).strip() == expected.strip()
