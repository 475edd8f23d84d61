"""GGUF: what is written is read back by the library, and by transformers' own reader, which gives our logits and ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_gpt

from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError, sample_ids
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.gguf_file import check_written, planned_tensors, vocabulary_of, write_gguf_export
from megagpt.convert.tokenizers import export_tokenizer
from megagpt.convert.weight_files import Parameters
from megagpt.model.gpt import GPT
from megagpt.tokenizer.plain_bytes import Bytes

gguf = pytest.importorskip("gguf")

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"num_kv_heads": 2, "tied_head": False, "rope_theta": 5e5},
    "qwen2": {"num_kv_heads": 1, "qkv_bias": True},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "head_size": 16},
}


def parameters_of(model: GPT) -> Parameters:
    parameters = Parameters(Path("none"), {}, {name: tuple(value.shape) for name, value in model.named_parameters()})
    parameters.hold(model)
    return parameters


def write(folder: Path, model: GPT, dtype: str = "fp32") -> Path:
    folder.mkdir()
    Bytes().save(folder.parent / "tokenizer")
    write_gguf_export(folder, parameters_of(model), model.config, Bytes(), folder.parent, {}, dtype)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_reads_our_logits_and_ids(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    fixed = {"gpt2": {"seq_len": 1024}, "qwen3": {"head_size": 128}}  # what its reader takes for granted
    model = random_gpt(vocab_size=264, **{**SHAPES[kind], **fixed.get(kind, {})})
    folder = write(tmp_path / "export", model)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = sample_ids(257, 40)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[..., :257], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_file_holds_every_tensor_and_token(tmp_path: Path, kind: str, dtype: str) -> None:
    model = random_gpt(vocab_size=264, **SHAPES[kind])
    folder = write(tmp_path / "export", model, dtype)
    checked = json.loads((folder / "checked.json").read_text())
    assert (checked["architecture"], checked["dtype"], checked["tokens_equal"]) == (kind, dtype, 257)
    reader = gguf.GGUFReader(folder / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert types["blk.1.attn_output.weight"] == {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    ours = model.state_dict()["blocks.1.mlp.out.weight"]
    rounded = ours.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()), rounded)
    assert reader.get_field("tokenizer.ggml.tokens").contents()[97] == "a"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 256


def test_a_file_of_other_weights_or_tokens_is_noticed(tmp_path: Path) -> None:
    model = random_gpt(vocab_size=264, **SHAPES["llama"])
    path = write(tmp_path / "export", model) / "model.gguf"
    export_tokenizer(Bytes(), tmp_path / "tokenizer", tmp_path, 48)
    vocabulary, _ = vocabulary_of(Bytes(), tmp_path, 257)
    tensors = planned_tensors(gguf, model.config, 257)
    check_written(gguf, path, tensors, parameters_of(model), vocabulary, "fp32")
    vocabulary.tokens[5] = "other"
    with pytest.raises(ConversionError, match=r"tokenizer\.ggml\.tokens is not the tokenizer's"):
        check_written(gguf, path, tensors, parameters_of(model), vocabulary, "fp32")
    with torch.no_grad():
        model.blocks[1].attention.key.weight[3, 4] += 1e-3  # pyright: ignore
    with pytest.raises(ConversionError, match=r"blk\.1\.attn_k\.weight is not the run's blocks\.1\.attention\.key\.weight"):
        check_written(gguf, path, tensors, parameters_of(model), vocabulary, "fp32")


def test_what_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    scaled = random_gpt(vocab_size=264, rope_scaling={"kind": "yarn", "factor": 4.0, "original_seq_len": 16})
    with pytest.raises(UserError, match=r"format=gguf: model\.rope_scaling is not written"):
        write(tmp_path / "scaled", scaled)
    large = random_gpt(vocab_size=264)
    with torch.no_grad():
        large.blocks[0].mlp.out.weight[0, 0] = 1e5  # pyright: ignore
    with pytest.raises(ConversionError, match=r"blk\.0\.ffn_down\.weight: a weight is not finite in fp16"):
        write(tmp_path / "large", large, "fp16")
    with pytest.raises(UserError, match="dtype=fp16: format=transformers is bf16 or fp32"):
        export_model(ExportConfig(run_dir=tmp_path, output_dir=tmp_path / "out", dtype="fp16"))
