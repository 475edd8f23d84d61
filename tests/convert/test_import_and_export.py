"""Every family both ways: logits equal transformers', weights come back bit for bit, a wrong mapping leaves nothing behind."""

import dataclasses
import errno
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import MODEL_TYPES, random_model, save_source
from ranks import run_ranks

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.scores import keep_score
from megagpt.config import Failure, UserError, validate
from megagpt.convert import export_hf, import_hf, weight_files
from megagpt.convert.compare_logits import ConversionError, sample_ids
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.families import FAMILIES, family_for, join, plan_tensors, split
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.convert.weight_files import WeightFolder
from megagpt.distributed.world import World, lone_world
from megagpt.evaluate.results import keep_result
from megagpt.files import read_json, sha256_file
from megagpt.model.gpt import ModelConfig

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

CASES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {"tie_word_embeddings": tied}) for model_type in MODEL_TYPES for tied in (False, True)),
    ("gpt2", {"n_head": 1}),
    ("gpt2", {"n_head": 2, "layer_norm_epsilon": 1e-3}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8}),
    ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "max_position_embeddings": 700}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    ("qwen3", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": 64}),
]


def ids_of(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]} " + " ".join(f"{key}={value}" for key, value in case[1].items())[:60]


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


FAST = [next(case for case in CASES if case[0] == model_type) for model_type in MODEL_TYPES]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES], ids=map(ids_of, CASES)
)
def test_logits_and_weights_both_ways(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model_type, changes = case
    source = random_model(model_type, **changes)
    save_source(source, tmp_path / "source")
    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    ours = load_model(tmp_path / "run")
    ids = sample_ids(257, 48)
    with torch.no_grad():
        logits = ours.model(ids)
    # fp32 in the same order of operations: what differs is the rounding of fused kernels
    torch.testing.assert_close(logits, logits_of(source, ids), atol=1e-5, rtol=1e-5)

    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "out", dtype="fp32"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert back.dtype == torch.float32
    expected, found = source.state_dict(), back.state_dict()
    assert {*expected} == {*found}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor[: len(found[name])]), name  # rows that no token has are cut
    torch.testing.assert_close(logits_of(back, ids), logits[..., :257], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "gpt2" else [pytest.mark.slow]) for name in MODEL_TYPES]
)
def test_bf16_weights_come_back_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    save_source(random_model(model_type, tie_word_embeddings=True, vocab_size=257), tmp_path / "source", torch.bfloat16)
    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    options: dict[str, Any] = {"dtype": "bf16", "shard_bytes": 9000}
    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "out", **options))
    assert (tmp_path / "out" / weight_files.INDEX).is_file()
    expected, found = WeightFolder(tmp_path / "source"), WeightFolder(tmp_path / "out")
    assert {*expected.tensors} == {*found.tensors}
    for name in expected.tensors:
        assert found.read(name).dtype == torch.bfloat16
        assert torch.equal(expected.read(name), found.read(name)), name


def test_an_export_names_what_it_was_made_from(tmp_path: Path) -> None:
    save_source(random_model("llama"), tmp_path / "source")
    checkpoint = import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    results, manifest_sha256 = tmp_path / "run/evaluations/step_00000000.json", sha256_file(checkpoint / "manifest.json")
    keep_score(checkpoint, 0, "a validation set", {"loss": 2.5})
    keep_result(results, {"step": 0, "measured": {"checkpoint": manifest_sha256}, "loss": 2.25})
    keep_result(results, {"step": 0, "measured": {"checkpoint": "0" * 64}, "loss": 1.125})  # of a course that was given up
    out = export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "out"))
    record = read_json(out / "checked.json")
    assert (record["source"]["validation_loss"], record["source"]["scores"]) == (2.5, {"loss": 2.25})
    assert record["source"]["manifest_sha256"] == manifest_sha256
    assert record["source"]["imported_from"]["files"]["model.safetensors"] == sha256_file(tmp_path / "source/model.safetensors")
    assert record["files"] == {path.name: sha256_file(path) for path in out.iterdir() if path.name != "checked.json"}
    assert record["logits"]["relative"] <= 1e-5
    card = (out / "README.md").read_text()
    assert record["source"]["manifest_sha256"] in card
    assert record["source"]["tokenizer"]["sha256"] in card
    config = read_json(out / "config.json")
    assert (config["rope_theta"], config["rope_scaling"], config["eos_token_id"]) == (10000.0, None, 256)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def kinds_of(model_type: str) -> list[str]:
    """Of a language model; the layer of a classifier is in test_classifiers_both_ways.py."""
    kinds = [row.theirs.replace("{i}", "*") for row in FAMILIES[model_type].rows]
    return [kind for kind in kinds if kind not in ("lm_head.weight", "score.weight")]


BROKEN = [(model_type, kind) for model_type in ("gpt2", "qwen2", "qwen3") for kind in kinds_of(model_type)]
BROKEN = [case for case in BROKEN if not (case[0] == "qwen2" and ("norm.weight" in case[1] and "self_attn" in case[1]))]
BROKEN = [case for case in BROKEN if not (case[0] == "qwen3" and case[1].endswith("bias"))]


FAST_BROKEN = ("transformer.h.*.attn.c_attn.bias", "model.layers.*.self_attn.q_norm.weight")


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [pytest.param(*case, marks=[] if case[1] in FAST_BROKEN else [pytest.mark.slow]) for case in BROKEN]
    + [pytest.param("llama", "lm_head.weight", marks=[pytest.mark.slow])],
)
def test_a_broken_mapping_is_refused_and_named(
    model_type: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one kind of tensor the rows are moved by one, on the way in and on the way out."""
    save_source(random_model(model_type, tie_word_embeddings=model_type != "llama"), tmp_path / "source")
    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "good"))
    moved = lambda planned, tensor: tensor.roll(1, 0) if planned.kind == kind else tensor  # noqa: E731
    monkeypatch.setattr(import_hf, "split", lambda planned, tensor, rows: split(planned, moved(planned, tensor), rows))
    with pytest.raises(ConversionError, match=rf"logits differ by .* most likely {re.escape(kind)} differs"):
        import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    slices = weight_files.slices_of
    monkeypatch.setattr(
        weight_files,
        "slices_of",
        lambda planned, parameters, dtype: (moved(planned, part) for part in slices(planned, parameters, dtype)),
    )
    with pytest.raises(ConversionError, match=rf"logits differ by .* most likely {re.escape(kind)} differs"):
        export_model(ExportConfig(run_dir=tmp_path / "good", output_dir=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "source"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"num_heads": 2, "num_kv_heads": 1, "head_size": 16},
            "what is computed between .* and model.layers.*self_attn.o_proj",
        ),
        ({"rope_theta": 1e5}, "what is computed between"),
        ({"norm_eps": 1e-2}, "most likely model.layers.*.input_layernorm.weight"),
    ],
)
def test_wrong_settings_are_refused(
    changes: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(random_model("llama"), tmp_path / "source")
    read = import_hf.read_source

    def wrong(source: Path, seq_len: int | None) -> Any:
        family, config, weights, plan = read(source, seq_len)
        return family, validate(ModelConfig, config.model_dump() | changes, source=""), weights, plan

    monkeypatch.setattr(import_hf, "read_source", wrong)
    with pytest.raises(ConversionError, match=what):
        import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))


@pytest.mark.slow
def test_rotary_tables_are_compared_where_no_logits_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch that shows far away only: all logits that are compared are equal."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8192}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    save_source(random_model("llama", max_position_embeddings=1 << 20, rope_parameters=rope), tmp_path / "source")
    read = import_hf.read_source

    def wrong(source: Path, seq_len: int | None) -> Any:
        family, config, weights, plan = read(source, seq_len)
        values = config.model_dump()
        values["rope_scaling"]["factor"] = 2.0 + 1e-4
        return family, validate(ModelConfig, values, source=""), weights, plan

    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "right"))
    monkeypatch.setattr(import_hf, "read_source", wrong)
    with pytest.raises(ConversionError, match=r"rotary tables differ by|logits differ"):
        import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))


def test_the_table_uses_every_parameter_once() -> None:
    config = ModelConfig(vocab_size=64, seq_len=8, num_layers=3, num_heads=2, hidden_size=8, qk_norm=True, tied_head=False)
    family = family_for(config)
    plan = plan_tensors(family, config, vocab_size=50)
    assert (family.model_type, len(plan)) == ("qwen3", 3 * 11 + 3)
    assert {planned.theirs: planned.shape for planned in plan}["lm_head.weight"] == (50, 8)
    broken = family.rows[:2] + family.rows[1:]
    with pytest.raises(RuntimeError, match=r"twice or never: blocks.0.attention_norm.weight"):
        plan_tensors(import_hf.Family("x", "x", broken, family.settings), config)
    with pytest.raises(RuntimeError, match=r"twice or never: norm.weight"):
        plan_tensors(import_hf.Family("x", "x", family.rows[:-3] + family.rows[-2:], family.settings), config)


def test_joining_is_the_inverse_of_splitting() -> None:
    config = ModelConfig(family="gpt2", vocab_size=64, seq_len=8, num_layers=1, num_heads=2, hidden_size=8)
    for planned in plan_tensors(family_for(config), config):
        tensor = torch.randn(planned.shape)
        rows = {
            name: (planned.shape[-1] if planned.transposed else planned.shape[0]) // len(planned.ours) for name in planned.ours
        }
        assert torch.equal(join(planned, split(planned, tensor, rows)), tensor)


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type='gemma2': it caps logits"),
        ("llama", {"model_type": "smollm3"}, "model_type='smollm3': it leaves out rotary positions in some layers"),
        ("llama", {"model_type": "xlnet"}, "model_type='xlnet': not known; gpt2, llama, mistral, qwen2, qwen3 are"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' can be converted"),
        ("llama", {"attention_bias": True}, "attention_bias=True: only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: only False"),
        ("llama", {"embedding_multiplier": 2.0}, "embedding_multiplier=2.0: this setting is not known here"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map="),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers=None: a number is expected"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic': default, linear, llama3, yarn",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor=2.0: not known for rope_type=yarn"),
        ("mistral", {"sliding_window": 32}, "sliding_window=32 is less than the 64 tokens of the model"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window=16 is less than"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu': only 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: only False"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place in a llama"),
        ("llama", {"intermediate_size": 40}, "gate_proj.weight has shape [48, 32], config.json makes it [40, 32]"),
        ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings=true, but lm_head.weight differs"),
        ("llama", {"vocab_size": 200}, "embed_tokens.weight has shape [300, 32], config.json makes it [200, 32]"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save_source(random_model(model_type, tie_word_embeddings=model_type == "gpt2"), tmp_path / "source")
    edit_config(source, **changes)
    with pytest.raises(UserError) as raised:
        import_model(ImportConfig(source=source, run_dir=tmp_path / "run"))
    assert message in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_window_that_covers_all_tokens_is_none(tmp_path: Path) -> None:
    source = save_source(random_model("mistral", sliding_window=32), tmp_path / "source")
    import_model(ImportConfig(source=source, run_dir=tmp_path / "run", seq_len=32))
    assert load_model(tmp_path / "run").model_config.seq_len == 32


def test_older_files_are_read(tmp_path: Path) -> None:
    """rope_theta and rope_scaling of 4.x, gpt2 without its prefix and with the buffers that it once saved."""
    from safetensors.torch import load_file, save_file

    save_source(random_model("llama", rope_parameters=LLAMA3), tmp_path / "llama")
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    section = {**values.pop("rope_parameters"), "type": "llama3"}
    values |= {"rope_theta": section.pop("rope_theta"), "rope_scaling": section, "torch_dtype": "float32"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values))
    import_model(ImportConfig(source=tmp_path / "llama", run_dir=tmp_path / "run"))
    scaling = load_model(tmp_path / "run").model_config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("llama3", 8.0)

    save_source(random_model("gpt2"), tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}, file, metadata={"format": "pt"})
    import_model(ImportConfig(source=tmp_path / "gpt2", run_dir=tmp_path / "older"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    source = save_source(random_model("llama"), tmp_path / "source")
    file = source / "model.safetensors"
    whole = file.read_bytes()

    def message() -> str:
        with pytest.raises(UserError) as raised:
            import_model(ImportConfig(source=source, run_dir=tmp_path / "run"))
        return str(raised.value)

    file.write_bytes(whole[:-100])
    assert "model.safetensors: is not a whole safetensors file" in message()
    file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    assert "model.safetensors: is not a whole safetensors file" in message()
    file.rename(source / "part.safetensors")
    (source / "part.safetensors").write_bytes(whole)
    assert "neither model.safetensors nor model.safetensors.index.json is in it" in message()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin only, a pickle, which can run code and is never opened" in message()
    (source / weight_files.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    assert "gone.safetensors: no such file in the folder" in message()
    (source / weight_files.INDEX).write_text(json.dumps({"weight_map": {"model.extra.weight": "part.safetensors"}}))
    assert "part.safetensors: model.extra.weight is not in it" in message()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_bytes_that_change_on_the_disk_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source(random_model("llama"), tmp_path / "source")
    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    write = weight_files.write_slices

    def torn(path: Path, slices: Any) -> tuple[int, str]:
        result = write(path, slices)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
        return result

    monkeypatch.setattr(weight_files, "write_slices", torn)
    with pytest.raises(ConversionError, match=r"lm_head.weight: its bytes on disk are not those that were written"):
        export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt2", "qk_norm": True}, "GPT2LMHeadModel has none of these"),
        ({"family": "gpt2", "num_kv_heads": 1}, "GPT2LMHeadModel has none of these"),
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm=true with qkv_bias=true"),
    ],
)
def test_models_that_no_family_computes_are_not_exported(changes: dict[str, Any], message: str) -> None:
    values = {"vocab_size": 64, "seq_len": 8, "num_layers": 1, "num_heads": 2, "hidden_size": 8}
    with pytest.raises(UserError, match=message):
        family_for(validate(ModelConfig, {**values, **changes}, source=""))


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "qwen3" else [pytest.mark.slow]) for name in MODEL_TYPES]
)
def test_a_model_above_the_limit_is_compared_module_by_module(
    model_type: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison, never both models in memory; a broken mapping is refused as in memory."""
    save_source(random_model(model_type, tie_word_embeddings=tied), tmp_path / "source")
    import_model(ImportConfig(source=tmp_path / "source", run_dir=tmp_path / "run"))
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "shard_bytes": 9000}
    whole = read_json(export_model(ExportConfig(output_dir=tmp_path / "whole", **options)) / "checked.json")
    monkeypatch.setattr(export_hf, "load_rounded", None)
    monkeypatch.setattr(export_hf, "open_reference", None)
    options["gate_memory_bytes"] = 0
    found = read_json(export_model(ExportConfig(output_dir=tmp_path / "streamed", **options)) / "checked.json")
    assert (whole["weights_in_memory"], found["weights_in_memory"]) == ("whole", "module by module")
    assert found["tensors"] == whole["tensors"]
    assert found["logits"]["largest_logit"] == pytest.approx(whole["logits"]["largest_logit"], rel=1e-5)
    assert found["logits"]["relative"] <= 1e-5

    kind = "transformer.h.*.attn.c_attn.weight" if model_type == "gpt2" else "model.layers.*.self_attn.k_proj.weight"
    slices = weight_files.slices_of
    monkeypatch.setattr(
        weight_files,
        "slices_of",
        lambda planned, *rest: (part.roll(1, 0) if planned.kind == kind else part for part in slices(planned, *rest)),
    )
    with pytest.raises(ConversionError, match=rf"logits differ by .* most likely {re.escape(kind)} differs"):
        export_model(ExportConfig(output_dir=tmp_path / "broken", **options))
    assert not (tmp_path / "broken").exists()


def exported_by_ranks(world: World, run_dir: Path, output_dir: Path, broken: bool) -> tuple[str, list[str]]:
    """What a rank is told, and the weight files that it wrote; of `broken`, rank 1's disk is full."""
    config = ExportConfig(run_dir=run_dir, output_dir=output_dir, shard_bytes=9000)
    write, names = weight_files.write_slices, []

    def noted(path: Path, slices: Any) -> Any:
        if broken and world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        names.append(path.name)
        return write(path, slices)

    weight_files.write_slices = noted
    try:
        export_model(config, world)
    except Failure as error:
        return str(error), names
    return "written", names


@pytest.mark.slow
def test_ranks_share_the_weight_files_of_an_export(tmp_path: Path) -> None:
    save_source(random_model("llama"), tmp_path / "source")
    run_dir = tmp_path / "run"
    import_model(ImportConfig(source=tmp_path / "source", run_dir=run_dir))
    alone = export_model(ExportConfig(run_dir=run_dir, output_dir=tmp_path / "one" / "out", shard_bytes=9000))
    files = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(files) > 3
    parts = run_ranks(exported_by_ranks, 2, tmp_path / "ranks", run_dir, tmp_path / "two" / "out", False)
    assert parts == [("written", files[0::2]), ("written", files[1::2])]
    shared = tmp_path / "two" / "out"
    assert [path.name for path in shared.parent.iterdir()] == ["out"]
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in shared.iterdir()) == names
    for name in names:
        if name != "checked.json":  # it has the time
            assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    records = [{**read_json(path / "checked.json"), "checked_at": ""} for path in (alone, shared)]
    assert records[0] == records[1]

    told = run_ranks(exported_by_ranks, 2, tmp_path / "ranks", run_dir, tmp_path / "broken" / "out", True)
    assert all("No space left on device" in text for text, _ in told), told
    assert not list((tmp_path / "broken").iterdir())


def test_ranks_share_nothing_else(tmp_path: Path) -> None:
    two = dataclasses.replace(lone_world(torch.device("cpu")), size=2)
    with pytest.raises(UserError, match="format=onnx is written by one process, there are 2"):
        export_model(ExportConfig(run_dir=tmp_path, output_dir=tmp_path / "out", format="onnx"), two)
