"""What earlier releases wrote is read, kept and finished: tests/fixtures/ holds a corpus and runs of each of them."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dedup_documents
import extract_documents
import filter_documents
import pytest
import tokenize_documents
import train_tokenizer

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints, verify
from megagpt.config import UserError, load
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup import dedup_documents as dedup
from megagpt.corpus.extraction import extract_documents as extraction
from megagpt.corpus.filters import filter_documents as filtering
from megagpt.corpus.packing import tokenize_documents as packing
from megagpt.corpus.runner.summary import stage_outputs
from megagpt.data.open_data import open_data
from megagpt.documents import read_documents
from megagpt.files import read_json, write_json
from megagpt.monitor.metrics import read_metrics
from megagpt.report.inspect_data import check_ledger, find_splits, verify_splits
from megagpt.train.config import TrainConfig
from megagpt.train.preflight import check_resume

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RELEASES = sorted(path.name for path in FIXTURES.glob("release_*"))
ENGINES = ("deepspeed", "fsdp")
STAGES: dict[str, Any] = {
    "extract": extract_documents.run,
    "filter": filter_documents.run,
    "dedup": dedup_documents.run,
    "tokenizer": train_tokenizer.run,
    "shards": tokenize_documents.run,
}
FORMATS = {
    "extract": extraction.FORMAT, "filter": filtering.FORMAT, "dedup": dedup.FORMAT, "shards": packing.FORMAT,
}  # fmt: skip
"""What the stages write today; the fixtures hold format 1."""


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a release's folder, which is the working directory: the settings in it are relative to it."""
    folder = tmp_path / request.param
    shutil.copytree(FIXTURES / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file of results; stage.json and index.json say who works there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("stage.json", "index.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Ids and texts of every file of a stage's output."""
    return {path.name: [(d.id, d.text) for d in read_documents(path)] for path in stage_outputs(folder)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_kept_as_it_is(release: Path, stage: str) -> None:
    before = tree(release / "corpus" / stage)
    STAGES[stage](load(CorpusConfig, ["corpus.yaml"]))
    assert tree(release / "corpus" / stage) == before


@pytest.mark.parametrize("name", ["lines", "later"])
def test_a_finished_deduplication_by_lines_is_kept_as_it_is(release: Path, name: str) -> None:
    before = tree(release / name / "dedup")
    dedup_documents.run(load(CorpusConfig, [f"{name}.yaml"]))
    assert tree(release / name / "dedup") == before


@pytest.mark.parametrize("stage", ["extract", "filter", "dedup", "shards"])
def test_an_unfinished_stage_is_finished_or_refused_by_its_format(release: Path, stage: str) -> None:
    words = ["unfinished.yaml", "executor=inline"]
    if FORMATS[stage] > 1:
        with pytest.raises(UserError, match=f"begun in format 1, while this release writes format {FORMATS[stage]}"):
            STAGES[stage](load(CorpusConfig, words))
        return
    STAGES[stage](load(CorpusConfig, words))
    if stage == "shards":
        assert list(verify_splits(find_splits(release / "unfinished" / "shards")))
        for name in ("train/shard_00000.bin", "train/shard_00001.bin", "validation/shard_00000.bin"):
            made, expected = (release / folder / "shards" / name for folder in ("unfinished", "corpus"))
            assert made.read_bytes() == expected.read_bytes(), name
    else:
        assert texts(release / "unfinished" / stage) == texts(release / "corpus" / stage)


def test_new_documents_are_compared_with_an_old_corpus(release: Path) -> None:
    shutil.rmtree(release / "later")
    dedup_documents.run(load(CorpusConfig, ["later.yaml", "executor=inline"]))
    summary = read_json(release / "later" / "dedup" / "summary.json")
    assert summary["rejected"] == {"dedup:exact": 1, "dedup:near": 1}


def test_finished_shards_verify(release: Path) -> None:
    found = list(verify_splits(find_splits(release / "corpus" / "shards")))
    assert [line.partition(", ")[2] for line in found] == ["7,169 tokens in 2 shards", "1,394 tokens in 1 shards"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_read(release: Path, engine: str) -> None:
    run_dir = Path("trained") / engine
    metrics = read_metrics(run_dir)
    assert (metrics.torn_lines, metrics.last_step) == (0, 4)
    assert "steps 0 to 3, samples 0 to 16" in next(iter(check_ledger(run_dir)))
    assert load_model(run_dir).step == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_accepted(release: Path, engine: str) -> None:
    (path,) = list_checkpoints(Path("trained") / engine)
    assert verify(path) == []
    config = load(TrainConfig, [f"trained/{engine}/config.yaml"])
    check_resume(config, open_data(config.data), read_json(path / "state.json"), path)


def test_what_is_loaded_of_a_checkpoint_is_in_its_manifest(release: Path) -> None:
    (path,) = list_checkpoints(Path("trained") / "fsdp")
    files = read_json(path / "manifest.json")["files"]
    write_json(path / "manifest.json", {"files": {name: entry for name, entry in files.items() if name != "state.json"}})
    assert verify(path) == [f"{path}/state.json: is not in the manifest"]
    write_json(path / "manifest.json", {"files": {**files, "../owner.json": {"size": 1, "sha256": ""}}})
    assert verify(path) == [f"{path}/manifest.json: names '../owner.json', which is not a file of the checkpoint's folder"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_resumed_and_ends_as_it_did(release: Path, project: Path, engine: str) -> None:
    before = {row["step"]: row["loss"] for row in read_metrics(Path("trained") / engine).of_kind("train")}
    subprocess.run([sys.executable, project / "tools" / "train_model.py", f"{engine}.yaml"], check=True)
    metrics = read_metrics(Path("trained") / engine)
    assert [row["step"] for row in metrics.of_kind("start")] == [0, 2]
    after = {row["step"]: row["loss"] for row in metrics.of_kind("train") if row["incarnation"] == 2}
    # fp32 sums of 128 losses of about 5.5: other kernels than those of the machine that made the fixture add in other orders
    assert after == pytest.approx({step: before[step] for step in (3, 4)}, rel=1e-5)
