"""Rows of a classifier: the text alone is read, and its class is the one target, where the text ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.config import UserError, validate
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.shards import read_manifest, verify_shard
from megagpt.documents import IGNORE
from megagpt.files import read_json
from megagpt.report.inspect_data import InspectConfig, inspect
from megagpt.tokenizer.open_tokenizer import open_tokenizer

SEQ_LEN = 32
ROWS = [("good film", "1"), ("no", "0"), ("a text that is much too long for one sample", "1"), ("what", "7"), ("fine", "1")]
CLASSES = ("negative", "positive")


def pack(folder: Path, **supervised: Any) -> Path:
    (folder / "rows.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in ROWS))
    rows = {"format": "text_label", "template": "plain", "classes": CLASSES, "labels": {"0": "negative", "1": "positive"}}
    values = {
        "pack_seq_len": SEQ_LEN,
        "validation_fraction": 0,
        "overlap_threshold": None,
        "supervised": {**rows, **supervised},
    }
    config = validate(TokenizeConfig, values, source="test")
    pack_documents([folder / "rows.tsv"], folder / "out", "bytes", config, Execution(num_workers=1, executor="inline"))
    return folder / "out"


@pytest.mark.parametrize("padding", ["packed", "padded"])
def test_the_class_is_the_target_of_the_last_token_of_its_text_and_no_input(padding: str, tmp_path: Path) -> None:
    out = pack(tmp_path, padding=padding)
    manifest, tokenizer = read_manifest(out / "train"), open_tokenizer("bytes")
    assert manifest.classes == CLASSES
    assert read_json(out / "train" / "manifest.json")["format"] == 3
    assert [*verify_shard(out / "train", manifest.shards[0], manifest.dtype)] == []
    data, found = TokenDataset(out / "train", seq_len=SEQ_LEN), {}
    for sample in (data.window(i) for i in range(data.num_windows())):
        assert sample.doc_lengths.sum() == SEQ_LEN
        for start, length in zip(np.cumsum(sample.doc_lengths) - sample.doc_lengths, sample.doc_lengths, strict=True):
            ids, targets = sample.inputs[start : start + length].tolist(), sample.targets[start : start + length]
            [last] = np.flatnonzero(targets != IGNORE)
            assert set(ids[last + 1 :]) == {tokenizer.eot_id}
            found[tokenizer.decode(ids[: last + 1])] = CLASSES[targets[last]]
    assert found == {text[: SEQ_LEN - 1]: CLASSES[int(label)] for text, label in ROWS if label in "01"}
    assert data.num_windows() == (4 if padding == "padded" else 2)
    rows = read_json(out / "summary.json")["rows"]
    assert (rows["malformed"], rows["truncated"]) == ({"label": 1}, 1)
    [row] = [json.loads(line) for line in (out / "malformed.jsonl").read_text().splitlines()]
    assert (row["line"], row["problem"]) == (4, "label='7' is none of ['0', '1']")
    shown = "\n".join(line for i in range(data.num_windows()) for line in inspect(InspectConfig(shards=out, sample=i)))
    for text, label in found.items():
        assert f"class ⟦{label}⟧\n  {text}<end of text>" in shown
    assert open_data(DataConfig.model_validate({
        "seq_len": SEQ_LEN, "document_mask": True, "shuffle_block": 1, "sources": {"a": {"path": str(out)}},
    })).train.datasets[0].manifest.classes == CLASSES  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"classes": ["a"]}, "at least two different names"),
        ({"classes": ["a", "a"]}, "at least two different names"),
        ({"template": "chatml"}, "classes need format=text_label, template=plain"),
        ({"system": "x"}, "no system message"),
        ({"labels": {"0": "negative", "1": "positve"}}, "labels: 'positve' is not one of classes"),
    ],
)
def test_settings_of_classes_that_do_not_fit(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        pack(tmp_path, **settings)


def test_labels_that_are_no_class_are_malformed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2: label: label='0' is none of \['1', '7'\]"):
        pack(tmp_path, classes=("1", "7"), labels={}, max_malformed=0)
