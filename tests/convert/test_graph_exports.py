"""Exports without transformers: the step function, ONNX in onnxruntime, an AOTInductor package, llama2.c."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_gpt
from test_llama2c import bytes_tokenizer, write_llama2c
from torch import Tensor

from megagpt.config import UserError
from megagpt.convert import llama2c
from megagpt.convert.compare_logits import ConversionError, sample_ids
from megagpt.convert.export_graph import open_onnx, open_package
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.convert.llama2c import read_llama2c, tokenizer_bin
from megagpt.convert.step_graph import StepFunction, StepGPT, compare_step, empty_past, greedy_ids
from megagpt.files import sha256_file
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.sentencepiece import SentencePiece


def stepped(module: StepGPT) -> StepFunction:
    def step(ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            logits, *present = module(ids, *past)
        return logits, present

    return step


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "gpt2"},
        {"num_kv_heads": 2, "qk_norm": True, "head_size": 16},
        {"num_kv_heads": 1, "qkv_bias": True, "tied_head": False},
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}},
    ],
    ids=str,
)
def test_the_step_function_is_the_model(changes: dict[str, Any]) -> None:
    model = random_gpt(**changes)
    compared, greedy = compare_step(model, stepped(StepGPT(model, 60)), 60, 5)
    assert compared.largest_difference <= 1e-5
    assert compared.greedy_equal == compared.logits == 2 * 48
    assert len(greedy) == 48
    assert max(greedy) < 60


def test_a_step_that_differs_is_refused() -> None:
    model, other = random_gpt(), random_gpt()
    step = stepped(StepGPT(model, 64))

    def forgets(ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, _ = step(ids, empty_past(model.config, len(ids)))
        return logits, list(past)

    with pytest.raises(ConversionError, match="logits through the cache differ by"):
        compare_step(model, forgets, 64, 5)
    with torch.no_grad():
        other.blocks[1].mlp.out.weight.mul_(1.01)  # type: ignore[union-attr]
    with pytest.raises(ConversionError, match="logits differ by"):
        compare_step(other, step, 64, 5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of llama2.c with a cut vocabulary of bytes, as a run."""
    folder = tmp_path_factory.mktemp("graphs")
    path = write_llama2c(folder / "model.bin")
    import_model(ImportConfig(source=path, run_dir=folder / "run", tokenizer=bytes_tokenizer(folder)))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "file", "opened"), [("onnx", "model.onnx", open_onnx), ("aotinductor", "model.pt2", open_package)]
)
def test_a_graph_gives_the_greedy_text(run_dir: Path, tmp_path: Path, kind: Any, file: str, opened: Any) -> None:
    folder = export_model(ExportConfig(run_dir=run_dir, output_dir=tmp_path / "graph", format=kind))
    checked = json.loads((folder / "checked.json").read_text())
    assert checked["files"][file] == sha256_file(folder / file)
    assert checked["logits"]["greedy_equal"] == checked["logits"]["logits"] > 500
    assert "tokenizer.json" in checked["files"]
    facts = json.loads((folder / "graph.json").read_text())
    assert (facts["seq_len"], facts["shapes"]["logits"], facts["eos_ids"]) == (300, ["batch", "length", 257], [256])
    assert facts["inputs"] == ["ids", "past_key_0", "past_value_0", "past_key_1", "past_value_1"]
    source = read_llama2c(run_dir.parent / "model.bin")
    step = opened(folder / file, source.config)
    assert greedy_ids(step, source.config, [256], 64) == checked["greedy_ids"]
    for batch, length in ((1, 7), (3, 1), (5, 40)):
        logits, present = step(sample_ids(257, length)[:1].expand(batch, -1), empty_past(source.config, batch))
        assert (logits.shape, present[3].shape) == ((batch, length, 257), (batch, 2, length, 4))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_llama2c_comes_back(tmp_path: Path, tied: bool) -> None:
    path = write_llama2c(tmp_path / "model.bin", tied=tied)
    import_model(ImportConfig(source=path, run_dir=tmp_path / "run", tokenizer=bytes_tokenizer(tmp_path)))
    folder = export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "back", format="llama2c"))
    before, after = read_llama2c(path), read_llama2c(folder / "model.bin")
    assert after.config.vocab_size == 257  # rows that no byte has are cut
    assert torch.equal(after.embedding, before.embedding[:257])
    assert all(torch.equal(after.blocks[name], before.blocks[name]) for name in before.blocks)
    assert (after.head is None) is tied
    notes = json.loads((folder / "checked.json").read_text())["tokenizer_notes"]
    assert notes == ["tokenizer.bin is not written: run.c reads SentencePiece models, this is bytes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "format=llama2c: model.qk_norm=True: run.c computes qk_norm=False only"),
        ({"rope_theta": 5e5}, "model.rope_theta=500000.0: run.c computes rope_theta=10000.0 only"),
        ({"family": "gpt2"}, "model.family=gpt2: run.c"),
        ({"head_size": 16}, "model.head_size=16: run.c"),
    ],
    ids=str,
)
def test_what_run_c_does_not_compute_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llama2c.write_llama2c(random_gpt(**changes), Bytes(), 64, tmp_path)


def test_only_transformers_has_bf16(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype=bf16: format=onnx is fp32"):
        export_model(ExportConfig(run_dir=tmp_path, output_dir=tmp_path / "out", format="onnx", dtype="bf16"))


@pytest.mark.realdata
def test_stories260k_comes_back_byte_for_byte(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "model"
    import_model(ImportConfig(source=model / "stories260K.bin", tokenizer=model / "tok512.bin", run_dir=tmp_path / "run"))
    folder = export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "back", format="llama2c"))
    assert (folder / "model.bin").read_bytes() == (model / "stories260K.bin").read_bytes()
    assert (folder / "tokenizer.bin").read_bytes() == (model / "tok512.bin").read_bytes()
    assert tokenizer_bin(SentencePiece(tmp_path / "run" / "tokenizer" / "tokenizer.model"))[1] == ""


@pytest.mark.realdata
@pytest.mark.slow
def test_stories260k_gives_its_expected_text_in_onnxruntime(shared_data: Path, tmp_path: Path) -> None:
    """The AOTInductor package of it is in bench/conversion/published_text.py: compiling takes minutes."""
    from tokenizers import Tokenizer

    model = shared_data / "model"
    import_model(ImportConfig(source=model / "stories260K.bin", tokenizer=model / "tok512.bin", run_dir=tmp_path / "run"))
    folder = export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "onnx", format="onnx"))
    config = read_llama2c(model / "stories260K.bin").config
    ids = greedy_ids(open_onnx(folder / "model.onnx", config), config, [1], 200)
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode([1, *ids])
    assert text == (model / "stories260K.expected.txt").read_text(encoding="utf-8")
