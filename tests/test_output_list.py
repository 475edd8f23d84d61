"""Lists of outputs: what is lost or changed is named by the next stage, and made again by a rerun, and only that."""

import shutil
from pathlib import Path
from typing import Any

import dedup_documents
import extract_documents
import filter_documents
import pytest
import tokenize_documents

from megagpt.config import UserError, load
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.packing import tokenize_documents as packing
from megagpt.corpus.runner import run_stage
from megagpt.data.open_data import DataConfig, SourceConfig, open_data
from megagpt.files import read_json, write_json
from megagpt.output_list import check_outputs
from megagpt.report.inspect_data import InspectConfig, inspect

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "release_0_1"
TOOLS: dict[str, Any] = {
    "extract": extract_documents,
    "filter": filter_documents,
    "dedup": dedup_documents,
    "shards": tokenize_documents,
}
NAME = "b.jsonl.zst"


def run(stage: str, *words: str) -> None:
    TOOLS[stage].run(load(CorpusConfig, ["corpus.yaml", "executor=inline", *words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that the present code made."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(FIXTURE / "dumps", folder / "dumps")
    shutil.copy(FIXTURE / "corpus.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in TOOLS:
            run(stage)
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, beside which the tools run."""
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made" / "corpus"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def change_counts(path: Path) -> None:
    found = read_json(path)
    write_json(path, {**found, "kept": found["kept"] - 1})


STAGE_DAMAGES = [
    (f"{NAME}.done.json", lose, "b.jsonl.zst.done.json: missing"),
    (f"{NAME}.done.json", cut, "b.jsonl.zst.done.json: .* bytes"),
    (f"{NAME}.done.json", change_counts, "its sha256 is not the one that was written"),
    (NAME, lose, "b.jsonl.zst: missing"),
    (NAME, cut, "bytes, .* were written"),
    (f"dropped/{NAME}", lose, "dropped/b.jsonl.zst: missing"),
    ("outputs.json", lose, "outputs.json: missing"),
    ("outputs.json", cut, "outputs.json: .* bytes"),
]


@pytest.mark.parametrize(("name", "damage", "what"), STAGE_DAMAGES)
@pytest.mark.parametrize("stage", ["extract", "dedup"])
def test_the_next_stage_names_what_is_missing_and_a_rerun_makes_only_that(
    corpus: Path, stage: str, name: str, damage: Any, what: str
) -> None:
    before, written = contents(corpus / stage), times(corpus / stage)
    damage(corpus / stage / name)
    following = {"extract": "filter", "dedup": "shards"}[stage]
    with pytest.raises(UserError, match=what) as refused:
        run(following)
    assert f"run tools/{stage}_documents.py again" in str(refused.value)
    run(stage)
    assert contents(corpus / stage) == before
    again = {path.name for path, when in times(corpus / stage).items() if when != written[path]}
    assert again <= {
        NAME,
        f"{NAME}.done.json",
        "outputs.json",
        "summary.json",
        "stage.json",
        "index.json",
        "own.json",
        "dedup.json",
    }
    run(following)


@pytest.mark.parametrize("stage", ["extract", "filter", "dedup"])
def test_a_flipped_bit_is_found_on_demand(corpus: Path, stage: str) -> None:
    before = contents(corpus / stage)
    flip(corpus / stage / NAME)
    check_outputs(corpus / stage)
    with pytest.raises(UserError, match="its sha256 is not the one that was written: it was changed or damaged"):
        check_outputs(corpus / stage, verify=True)
    with pytest.raises(UserError, match="its sha256 is not the one that was written"):
        run({"extract": "filter", "filter": "dedup", "dedup": "shards"}[stage], "verify=true")
    run(stage, "verify=true")
    assert contents(corpus / stage) == before


@pytest.mark.parametrize(
    "name",
    ["duplicates/b.jsonl.zst", "dedup.json", "index/*/kept_by.i64", "index/*/own.json", "index/*/blocks/000001/keys.u64"],
)
@pytest.mark.parametrize("damage", [lose, cut])
def test_reports_and_index_of_a_deduplication_are_made_again(corpus: Path, name: str, damage: Any) -> None:
    before = contents(corpus / "dedup")
    (path,) = (corpus / "dedup").glob(name)
    damage(path)
    with pytest.raises(UserError, match=f"{path.name}: "):
        run("shards")
    run("dedup")
    assert contents(corpus / "dedup") == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train/manifest.json", lose),
        ("validation/manifest.json", cut),
        ("tokenizer/bytes.tokenizer", lose),
        ("leaks.jsonl", lose),
        ("outputs.json", lose),
        ("train/shard_00001.bin", lose),
        ("train/shard_00000.idx", cut),
        ("validation/shard_00000.docs.parquet", lose),
    ],
)
def test_shards_are_made_again_and_only_what_is_lost(corpus: Path, name: str, damage: Any) -> None:
    before, written = contents(corpus / "shards"), times(corpus / "shards")
    damage(corpus / "shards" / name)
    run("shards")
    assert contents(corpus / "shards") == before
    again = {path.name for path, when in times(corpus / "shards").items() if when != written[path] and "shard_" in path.name}
    assert {shard.partition(".")[0] for shard in again} <= {Path(name).name.partition(".")[0]}


@pytest.mark.parametrize("name", ["train/manifest.json", "leaks.jsonl", "tokenizer/bytes.tokenizer"])
def test_verify_names_what_is_lost_of_shards(corpus: Path, name: str) -> None:
    list(inspect(InspectConfig(shards=corpus / "shards", verify=True)))
    (corpus / "shards" / name).unlink()
    for folder in ("shards", "shards/validation"):
        with pytest.raises(UserError, match=f"{name}: missing|{Path(name).parent}: no"):
            list(inspect(InspectConfig(shards=corpus / folder, verify=True)))


def test_verify_reads_every_byte_of_a_stage(corpus: Path) -> None:
    assert list(inspect(InspectConfig(stage=corpus / "filter", verify=True))) == [f"{corpus}/filter: sound, 2 files"]
    flip(corpus / "filter" / "rejected" / "a.warc.jsonl.zst")
    with pytest.raises(UserError, match=r"rejected/a.warc.jsonl.zst: its sha256 is not the one that was written"):
        list(inspect(InspectConfig(stage=corpus / "filter", verify=True)))


def test_training_misses_a_lost_validation_split(corpus: Path) -> None:
    config = DataConfig(sources={"a": SourceConfig(path=corpus / "shards")}, seq_len=32)
    assert list(open_data(config).validation) == ["a"]
    shutil.rmtree(corpus / "shards" / "validation")
    with pytest.raises(UserError, match=r"validation/manifest.json: missing"):
        open_data(config)


def test_a_flipped_bit_in_a_shard_is_made_again_on_demand(corpus: Path) -> None:
    before = contents(corpus / "shards")
    flip(corpus / "shards" / "train" / "shard_00001.bin")
    run("shards")
    assert contents(corpus / "shards") != before
    run("shards", "verify=true")
    assert contents(corpus / "shards") == before


def test_outputs_without_a_list_are_read_and_named_as_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    assert [path.name for path in run_stage.stage_outputs(Path("corpus/extract"))] == ["a.warc.jsonl.zst", NAME]
    assert "corpus/extract: an earlier release made it and kept no list of its outputs: unverified" in caplog.text
    Path(f"corpus/extract/{NAME}.done.json").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files have their .done.json"):
        run("filter")
    with pytest.raises(UserError, match="corpus/extract: unfinished, and begun in format 1"):
        run("extract")
    run("extract", "overwrite=true")
    assert len(check_outputs(Path("corpus/extract"), verify=True)) == 2
    Path("corpus/shards/train/manifest.json").unlink()
    bins = {path: path.read_bytes() for path in Path("corpus/shards").rglob("*.bin")}
    run("shards")
    assert packing.shard_problems(Path("corpus/shards"), None, verify=True) == []
    assert {path: path.read_bytes() for path in bins} == bins


def test_a_kill_while_a_file_is_made_again_leaves_nothing_that_looks_complete(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(corpus / "filter")
    (corpus / "filter" / NAME).unlink()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_stage, "finish_file", die)
        with pytest.raises(KeyboardInterrupt):
            run("filter")
    assert not (corpus / "filter" / "summary.json").exists()
    with pytest.raises(UserError, match="no finished stage here"):
        run("dedup")
    run("filter")
    assert contents(corpus / "filter") == before
