"""Rows of Hugging Face datasets become files of rows, once; what a dataset lacks is said by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenize_documents

from megagpt.config import UserError, validate
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.packing.dataset_rows import with_datasets_as_files
from megagpt.data.dataset import TokenDataset
from megagpt.files import read_json
from megagpt.tokenizer.open_tokenizer import open_tokenizer

ROWS = [{"text": f"review {i} is {'good' if i % 2 else 'bad'}", "label": i % 2, "idx": i} for i in range(30)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits, saved as `datasets` does; labels are numbers with names."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"]), "idx": datasets.Value("int32")}
    )
    folder = tmp_path_factory.mktemp("dataset") / "reviews"
    splits = {"train": ROWS[:20], "dev": ROWS[20:]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows, features=features) for name, rows in splits.items()})
    made.save_to_disk(str(folder))
    return folder


def settings(work_dir: Path, name: str, **supervised: Any) -> CorpusConfig:
    supervised = {"format": "text_label", "labels": {"0": "negative", "1": "positive"}, **supervised}
    tokenize = {
        "inputs": [name],
        "tokenizer": "bytes",
        "pack_seq_len": 96,
        "validation_fraction": 0,
        "overlap_threshold": None,
        "supervised": supervised,
    }
    values = {"work_dir": str(work_dir), "num_workers": 1, "executor": "inline", "tokenize": tokenize}
    return validate(CorpusConfig, values, source="test")


@pytest.mark.slow
@pytest.mark.parametrize(("split", "rows"), [("train", ROWS[:20]), ("dev", ROWS[20:])])
def test_the_rows_of_a_split_are_learned(split: str, rows: list[dict[str, Any]], saved: Path, tmp_path: Path) -> None:
    tokenize_documents.run(settings(tmp_path, f"datasets:{saved}", split=split))
    shards = tmp_path / "shards"
    data, tokenizer = TokenDataset(shards / "train", seq_len=96), open_tokenizer(shards / "tokenizer")
    text = "".join(tokenizer.decode(data.window(i).inputs.tolist()) for i in range(data.num_windows()))
    assert all(row["text"] in text for row in rows)
    assert not any(row["text"] in text for row in ROWS if row not in rows)
    assert read_json(shards / "summary.json")["rows"]["malformed"] == {}
    assert sum(read_json(shards / "summary.json")["splits"][name]["documents"] for name in ("train", "validation")) == len(rows)


@pytest.mark.slow
def test_a_dataset_is_read_once_and_again_with_overwrite(saved: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, f"datasets:{saved}").tokenize.supervised
    [first] = with_datasets_as_files([f"datasets:{saved}"], tmp_path, config)
    lines = [json.loads(line) for line in Path(first).read_text().splitlines()]
    assert lines == [{"text": row["text"], "label": row["label"]} for row in ROWS[:20]]
    Path(first).write_text("kept\n")
    assert with_datasets_as_files(["a.jsonl", f"datasets:{saved}"], tmp_path, config) == ("a.jsonl", first)
    assert Path(first).read_text() == "kept\n"
    with_datasets_as_files([f"datasets:{saved}"], tmp_path, config, overwrite=True)
    assert len(Path(first).read_text().splitlines()) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "question_answer", "labels": {}}, r"reviews: has no column 'question'.*it has \['idx', 'label', 'text'\]"),
        ({"split": "absent"}, r"reviews: cannot be loaded \(tokenize.supervised.split=absent\)"),
    ],
)
def test_what_a_dataset_lacks_is_named(changes: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tokenize_documents.run(settings(tmp_path, f"datasets:{saved}", **changes))
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not (tmp_path / "rows").exists()


def test_documents_of_a_dataset_are_not_read_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenize\.inputs: datasets:x: .*tokenize\.supervised is not set"):
        with_datasets_as_files(["datasets:x"], tmp_path, None)
