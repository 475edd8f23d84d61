"""LoRA adapters in peft's format: peft loads ours and ours are merged from peft's, with equal logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model, save_source

from megagpt.checkpoint.base_weights import base_record
from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import FORMAT
from megagpt.checkpoint.partitions import write_safetensors
from megagpt.checkpoint.save_load import seal
from megagpt.config import UserError
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.data.state import TrainState
from megagpt.engine.build import whole_shapes
from megagpt.files import read_json, write_json
from megagpt.model.tune import LoraConfig, TuneConfig

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def tuned_run(base: Path, run_dir: Path, lora: LoraConfig, classes: tuple[str, ...] = ()) -> Path:
    """A run with random adapters beside an imported model; a B of zeros would make every comparison pass."""
    loaded, tune = load_model(base), TuneConfig(lora=lora)
    generator = torch.Generator().manual_seed(1)
    config = loaded.model_config.model_copy(update={"classes": classes})
    shapes = whole_shapes(config, tune, trained_only=True)
    weights = {f"param.{n}": torch.randn(shape.numel(), generator=generator) * 0.2 for n, shape in shapes.items()}
    folder = run_dir / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    size, digest = write_safetensors(folder / "pieces_00000.safetensors", weights, dict.fromkeys(weights, "0"))
    state = {
        "format": FORMAT,
        "train_state": TrainState(step=5).to_json(),
        "updates": 5,
        "model": config.model_dump(mode="json"),
        "config": {"tune": tune.model_dump(mode="json")},
        "tokenizer_sha256": loaded.tokenizer.fingerprint,
        "base": base_record(loaded.path, None),
    }
    write_json(folder / "state.json", state)
    seal(folder, {"pieces_00000.safetensors": {"size": size, "sha256": digest}})
    loaded.tokenizer.save(run_dir / "tokenizer")
    return run_dir


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(IDS)
    return (found if isinstance(found, torch.Tensor) else found.logits)[..., :256]


TARGETS = {
    "llama": [("*",), ("attention.query", "mlp.out")],
    "gpt2": [("*",), ("attention.query", "attention.value", "mlp.up")],
}


@pytest.mark.parametrize(("family", "targets"), [(family, t) for family, found in TARGETS.items() for t in found], ids=str)
def test_peft_loads_our_adapters(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = save_source(random_model(family), tmp_path / "source")
    import_model(ImportConfig(source=source, run_dir=tmp_path / "base"))
    run_dir = tuned_run(tmp_path / "base", tmp_path / "run", LoraConfig(rank=3, alpha=5, targets=targets))
    folder = export_model(ExportConfig(run_dir=run_dir, output_dir=tmp_path / "adapter", adapter_only=True, base_model="x"))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    plain = logits(base)
    theirs, ours = logits(PeftModel.from_pretrained(base, folder).eval()), logits(load_model(run_dir).model)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()  # fp32: merged here, two products there
    assert (plain - ours).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_of_peft_are_merged_into_what_is_imported(family: str, tmp_path: Path) -> None:
    import peft

    base = random_model(family)
    source, plain = save_source(base, tmp_path / "source"), logits(base)
    names = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2",
        rank_pattern={names[1]: 2}, use_rslora=family == "gpt2",
    )  # fmt: skip
    model: Any = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    import_model(ImportConfig(source=source, run_dir=tmp_path / "run", adapter=tmp_path / "adapter"))
    theirs, ours = logits(model), logits(load_model(tmp_path / "run").model)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (plain - ours).abs().max() > 0.1
    files = read_json(tmp_path / "run" / "checkpoints" / "step_00000000" / "state.json")["imported_from"]["files"]
    assert "adapter/adapter_model.safetensors" in files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classifier_with_adapters_goes_both_ways(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    classes = ("bad", "fair", "good")
    source = save_source(random_model(family), tmp_path / "source")
    import_model(ImportConfig(source=source, run_dir=tmp_path / "base"))
    run_dir = tuned_run(tmp_path / "base", tmp_path / "run", LoraConfig(rank=3, targets=("*",)), classes)
    ours = load_model(run_dir, classifier=True)
    folder = export_model(ExportConfig(run_dir=run_dir, output_dir=tmp_path / "adapter", adapter_only=True, base_model="x"))
    names = {"id2label": dict(enumerate(classes)), "pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=3, **names).eval()
    save_source(base, tmp_path / "of_classes")
    theirs: Any = PeftModel.from_pretrained(base, folder).eval()
    ids = IDS.clamp(min=1)  # 0 is padding there
    with torch.no_grad():
        mine, found = ours.model(ids)[:, -1], theirs(ids).logits
    assert (found - mine).abs().max() < 1e-5 * mine.abs().max()
    theirs.save_pretrained(tmp_path / "saved")  # peft names modules_to_save as it likes
    for number, adapter in enumerate((folder, tmp_path / "saved")):
        import_model(ImportConfig(source=tmp_path / "of_classes", run_dir=tmp_path / f"again{number}", adapter=adapter))
        again = load_model(tmp_path / f"again{number}", classifier=True)
        assert again.model_config.classes == classes
        with torch.no_grad():
            assert (again.model(ids)[:, -1] - mine).abs().max() < 1e-5 * mine.abs().max()
    with pytest.raises(UserError, match=r"is a classifier's, and .*source is a language model"):
        import_model(ImportConfig(source=source, run_dir=tmp_path / "no", adapter=folder))
    config = read_json(folder / "adapter_config.json")
    for modules, match in (
        (["lm_head"], r"modules_to_save=\[\"lm_head\"\]: only a classifier's score"),
        (None, "score.weight is in it"),
    ):
        write_json(folder / "adapter_config.json", {**config, "modules_to_save": modules})
        with pytest.raises(UserError, match=match):
            import_model(ImportConfig(source=tmp_path / "of_classes", run_dir=tmp_path / "no", adapter=folder))
    assert not (tmp_path / "no").exists()


def test_what_is_no_plain_adapter_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save_source(random_model("llama"), tmp_path / "source")
    import_model(ImportConfig(source=source, run_dir=tmp_path / "base"))
    run_dir = tuned_run(tmp_path / "base", tmp_path / "run", LoraConfig(targets=("mlp.up",), also_train=("embedding.weight",)))
    refused = ExportConfig(run_dir=run_dir, output_dir=tmp_path / "out", adapter_only=True)
    with pytest.raises(UserError, match=r"has trained embedding\.weight beside its adapters"):
        export_model(refused)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has no adapters"):
        export_model(refused.model_copy(update={"run_dir": tmp_path / "base"}))
    run_dir = tuned_run(tmp_path / "base", tmp_path / "plain", LoraConfig(targets=("mlp.up",)))
    adapter = export_model(refused.model_copy(update={"run_dir": run_dir}))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["rank_pattern"]) == (8, ["up_proj"], {})
    for changes, match in (
        ({"use_dora": True}, "adapter_config.json: use_dora=true: is not merged"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type=IA3: LORA is expected"),
        ({"r": 4}, "lora_A has 8 rows, .* says r=4"),
    ):
        write_json(adapter / "adapter_config.json", {**config, **changes})
        with pytest.raises(UserError, match=match):
            import_model(ImportConfig(source=source, run_dir=tmp_path / "no", adapter=adapter))
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": "somebody/source"})
    import_model(ImportConfig(source=source, run_dir=tmp_path / "same", adapter=adapter))
    assert "was trained on" not in caplog.text
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": "somebody/another"})
    import_model(ImportConfig(source=source, run_dir=tmp_path / "another", adapter=adapter))
    assert f"was trained on somebody/another, and is merged into {source}" in caplog.text
    other = save_source(random_model("llama", num_hidden_layers=1), tmp_path / "other")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: none of the model's weights"):
        import_model(ImportConfig(source=other, run_dir=tmp_path / "no", adapter=adapter))
    assert not (tmp_path / "no").exists()
