"""Classifiers as transformers has them: the same scores of padded texts, names of classes, and back again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from served import write_run

from megagpt.checkpoint.load_model import load_model
from megagpt.config import UserError
from megagpt.convert import import_hf
from megagpt.convert.compare_logits import ConversionError
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.convert.load_export import load_export
from megagpt.files import read_json, write_json

CLASSES = ["bad", "fair", "good"]
TEXTS = ("so so", "a very good one", "x")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_gives_the_same_scores(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    heads = {"num_kv_heads": None} if family == "gpt2" else {}
    write_run(tmp_path / "run", family=family, vocab_size=257, classes=CLASSES, tied_head=False, **heads)
    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "export", dtype="fp32"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert type(theirs).__name__ == {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[family]
    assert [theirs.config.id2label[i] for i in range(3)] == CLASSES
    ours, tokenizer = load_model(tmp_path / "run", classifier=True), AutoTokenizer.from_pretrained(tmp_path / "export")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**batch).logits
        for text, logits in zip(TEXTS, found, strict=True):
            ids = torch.tensor([ours.tokenizer.encode(text)])
            torch.testing.assert_close(logits, ours.model(ids)[0, -1], atol=1e-5, rtol=0)
    # module by module, and back
    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "small", dtype="fp32", gate_memory_bytes=0))
    assert read_json(tmp_path / "small" / "checked.json")["weights_in_memory"] == "module by module"
    import_model(ImportConfig(source=tmp_path / "export", run_dir=tmp_path / "again"))
    again = load_model(tmp_path / "again", classifier=True)
    assert again.model_config.classes == tuple(CLASSES)
    theirs, mine = again.model.state_dict(), ours.model.state_dict()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    with pytest.raises(UserError, match=r"is a classifier of \['bad', 'fair', 'good'\] \(model.classes\), which gives no text"):
        load_export(tmp_path / "export")
    values = read_json(tmp_path / "export" / "config.json")
    write_json(tmp_path / "export" / "config.json", {**values, "id2label": {"1": "a", "2": "b", "3": "c"}})
    with pytest.raises(UserError, match="names by numbers from 0 are expected"):
        import_model(ImportConfig(source=tmp_path / "export", run_dir=tmp_path / "wrong"))


def test_a_broken_layer_of_classes_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", family="llama", vocab_size=257, classes=CLASSES, tied_head=False)
    export_model(ExportConfig(run_dir=tmp_path / "run", output_dir=tmp_path / "export", dtype="fp32"))
    split = import_hf.split

    def rolled(planned: Any, tensor: torch.Tensor, rows: list[int]) -> Any:
        return split(planned, tensor.roll(1, 0) if planned.kind == "score.weight" else tensor, rows)

    monkeypatch.setattr(import_hf, "split", rolled)
    with pytest.raises(ConversionError, match=r"logits differ by .* most likely score\.weight differs"):
        import_model(ImportConfig(source=tmp_path / "export", run_dir=tmp_path / "again"))
    assert not (tmp_path / "again").exists()
