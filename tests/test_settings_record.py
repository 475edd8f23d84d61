"""Settings that are added later: no result that was made before is refused, and what differs is named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args

import dedup_documents
import extract_documents
import filter_documents
import pytest
import tokenize_documents
from pydantic import Field

from megagpt import settings_record
from megagpt.checkpoint.on_disk import list_checkpoints, read_state
from megagpt.config import Config, UserError, load, section_classes
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup import dedup_documents as dedup
from megagpt.corpus.extraction import extract_documents as ingest
from megagpt.corpus.filters import filter_documents as filtering
from megagpt.corpus.packing import tokenize_documents as pack
from megagpt.data.open_data import Data, open_data
from megagpt.files import read_json, write_json
from megagpt.settings_fields import FIELDS, LATER, RENAMED
from megagpt.settings_record import MadeWith, filled, fingerprint, read_settings, recorded
from megagpt.train.config import TrainConfig
from megagpt.train.loop import digest_settings
from megagpt.train.preflight import check_resume

FIXTURES = Path(__file__).resolve().parent / "fixtures"
STAGES = {
    "extract": (extract_documents, ingest, "corpus/extract/stage.json"),
    "filter": (filter_documents, filtering, "corpus/filter/stage.json"),
    "dedup": (dedup_documents, dedup, "corpus/dedup/index/index.json"),
    "tokenize": (tokenize_documents, pack, "corpus/shards/stage.json"),
}


@pytest.fixture(params=sorted(path.name for path in FIXTURES.glob("release_*")))
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a release's folder, which is the working directory."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


def sections(annotation: Any) -> Iterator[type[Config]]:
    """The settings classes in an annotation, those in tuples and dicts included."""
    yield from section_classes(annotation)
    for inner in get_args(annotation):
        yield from sections(inner)


def compared_classes() -> dict[str, type[Config]]:
    """The classes whose settings results are compared by: the sections of a corpus, and those of a run."""
    found: dict[str, type[Config]] = {}
    todo = [TrainConfig, *(c for field in CorpusConfig.model_fields.values() for c in sections(field.annotation))]
    while todo:
        config_class = todo.pop()
        assert found.setdefault(config_class.__name__, config_class) is config_class, f"two classes {config_class.__name__}"
        todo += [c for f in config_class.model_fields.values() for c in sections(f.annotation) if c.__name__ not in found]
    return found


def undeclared(classes: dict[str, type[Config]]) -> list[str]:
    """One line per class whose fields and those of settings_fields.py differ; of new fields the row as LATER needs it."""
    lines = []
    for name, config_class in classes.items():
        first_names = {RENAMED.get(name, {}).get(field, field): field for field in config_class.model_fields}
        declared = {*FIELDS.get(name, {}), *LATER.get(name, {})}
        defaults = {new: settings_record._value_before(config_class, first_names[new]) for new in first_names.keys() - declared}
        without = sorted(new for new, value in defaults.items() if value is settings_record._NEVER)
        if row := {new: value for new, value in sorted(defaults.items()) if new not in without}:
            lines.append(f"{name}: new fields: LATER needs {row!r} (or the values that results made before had)")
        if without:
            lines.append(f"{name}: new fields {without}: they need a default, results made before lack them")
        if gone := sorted(declared - first_names.keys()):
            lines.append(f"{name}: no longer fields: {gone}: a renamed one needs a row in RENAMED")
    lines += [f"{name}: no such class of settings" for name in sorted({*FIELDS, *LATER, *RENAMED} - classes.keys())]
    return lines


def test_every_field_is_declared() -> None:
    assert not (lines := undeclared(compared_classes())), "\n".join(["megagpt/settings_fields.py:", *lines])


def test_a_field_that_is_not_declared_is_named_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = compared_classes()
    monkeypatch.delitem(LATER, "C4Config")
    monkeypatch.setitem(FIELDS, "GuardConfig", {**FIELDS["GuardConfig"], "old": 1})
    monkeypatch.setitem(
        FIELDS, "ModelConfig", {key: value for key, value in FIELDS["ModelConfig"].items() if key != "num_heads"}
    )
    monkeypatch.setitem(FIELDS, "Gone", {})
    assert sorted(undeclared(classes)) == [
        "C4Config: new fields: LATER needs {'keep_code': False} (or the values that results made before had)",
        "Gone: no such class of settings",
        "GuardConfig: no longer fields: ['old']: a renamed one needs a row in RENAMED",
        "ModelConfig: new fields ['num_heads']: they need a default, results made before lack them",
    ]


@pytest.mark.slow
def test_a_further_field_in_every_class_refuses_nothing(release: Path, project: Path) -> None:
    script = project / "tests" / "support" / "with_new_settings.py"
    paths = os.pathsep.join(str(project / folder) for folder in ("tests/support", "tools"))
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing refused" in done.stdout


class Inner(Config):
    rate: float = 0.5


class First(Config):
    """As it was in the first release."""

    name: str
    sections: dict[str, Inner] = Field(default={})


class Second(Config):
    """`First` with more fields, of which one has another default than what was before it, and one is renamed."""

    title: str
    sections: dict[str, Inner] = Field(default={})
    favour: Literal["precision", "recall"] = "recall"
    inner: Inner = Inner()
    limit: int | None = None


@pytest.fixture
def two_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Second` is what has become of `First`."""
    fields: dict[str, dict[str, Any]] = {"Second": {"name": ..., "sections": {}}, "Inner": {"rate": 0.5}}
    monkeypatch.setattr(settings_record, "FIELDS", fields)
    monkeypatch.setattr(settings_record, "LATER", {"Second": {"favour": "precision"}})
    monkeypatch.setattr(settings_record, "RENAMED", {"Second": {"title": "name"}})


@pytest.mark.usefixtures("two_releases")
def test_a_hash_is_that_of_before_while_later_fields_say_what_was() -> None:
    before = fingerprint(First(name="a", sections={"x": Inner(rate=0.1)}))
    same = Second(title="a", sections={"x": Inner(rate=0.1)}, favour="precision")
    assert recorded(same) == {"name": "a", "sections": {"x": {"rate": 0.1}}}
    assert fingerprint(same) == before
    others = ({"favour": "recall"}, {"limit": 3}, {"inner": Inner(rate=0.4)}, {"title": "b"}, {"sections": {}})
    assert len({before, *(fingerprint(same.model_copy(update=change)) for change in others)}) == 6


@pytest.mark.usefixtures("two_releases")
def test_stored_settings_get_what_they_lack_and_differences_are_named() -> None:
    stored = First(name="a", sections={"x": Inner()}).model_dump(mode="json")
    assert filled(Second, stored) == {
        "title": "a", "sections": {"x": {"rate": 0.5}}, "favour": "precision", "inner": {"rate": 0.5}, "limit": None,
    }  # fmt: skip
    assert read_settings(Second, stored, source="test") == Second(title="a", sections={"x": Inner()}, favour="precision")
    now = MadeWith("h", "extract", Second(title="a", sections={"x": Inner(rate=0.25)}))
    assert now.other({"settings": stored}) == (
        "other settings (extract.favour: precision -> recall, extract.sections.x.rate: 0.5 -> 0.25)"
    )
    assert now.other({}) == "other settings or inputs (an earlier release made it, and kept only a hash of them)"
    same = MadeWith("h", "extract", Second(title="a", sections={"x": Inner()}, favour="precision"))
    assert same.other({"settings": stored}) == "other inputs"


@pytest.mark.parametrize(
    ("stage", "word", "named"),
    [
        ("extract", "extract.source=other", "extract.source: fixture -> other"),
        ("filter", "filter.min_length.min_characters=160", "filter.min_length.min_characters: 150 -> 160"),
        ("dedup", "dedup.threshold=0.7", "dedup.threshold: 0.8 -> 0.7"),
        ("tokenize", "tokenize.seed=1", "tokenize.seed: 0 -> 1"),
    ],
)
def test_what_differs_is_named_once_settings_are_kept(
    release: Path, stage: str, word: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, module, _ = STAGES[stage]
    monkeypatch.setattr(module, "FORMAT", 1)  # that of the fixtures: results of an earlier one are left as they are
    with pytest.raises(UserError, match="an earlier release made it, and kept only a hash"):
        tool.run(load(CorpusConfig, ["corpus.yaml", word]))
    tool.run(load(CorpusConfig, ["corpus.yaml"]))  # from here on stage.json holds the settings
    with pytest.raises(UserError, match=f"other settings \\({named}\\)"):
        tool.run(load(CorpusConfig, ["corpus.yaml", word]))


@pytest.mark.parametrize("stage", STAGES)
def test_of_an_earlier_format_what_is_finished_stays_and_what_is_not_is_refused(
    release: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, module, marker = STAGES[stage]
    monkeypatch.setattr(module, "FORMAT", 9)
    before = {path: path.read_bytes() for path in (release / "corpus").rglob("*") if path.is_file()}
    tool.run(load(CorpusConfig, ["corpus.yaml"]))
    assert {path: path.read_bytes() for path in (release / "corpus").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="unfinished, and begun in format 1, while this release writes format 9"):
        tool.run(load(CorpusConfig, ["unfinished.yaml"]))
    tool.run(load(CorpusConfig, ["unfinished.yaml", "executor=inline", "overwrite=true"]))
    assert read_json(release / marker.replace("corpus", "unfinished"))["format"] == 9
    monkeypatch.setattr(module, "FORMAT", 1)
    with pytest.raises(UserError, match="format 9 is of a later release; this one knows formats up to 1"):
        tool.run(load(CorpusConfig, ["unfinished.yaml"]))


def test_a_resume_names_a_later_field_that_is_set(release: Path) -> None:
    (path,) = list_checkpoints(Path("trained") / "fsdp")
    saved = read_state(path)
    del saved["config"]["model"]["qk_norm"]  # as if it had been added since
    config = load(TrainConfig, ["fsdp.yaml"])
    check_resume(config, open_data(config.data), saved, path)
    config = load(TrainConfig, ["fsdp.yaml", "model.qk_norm=true"])
    with pytest.raises(UserError, match=r"model \(qk_norm: False -> True\)"):
        check_resume(config, open_data(config.data), saved, path)


def test_a_state_of_a_later_format_is_refused_by_name(release: Path) -> None:
    (path,) = list_checkpoints(Path("trained") / "fsdp")
    write_json(path / "state.json", {**read_state(path), "format": 2})
    with pytest.raises(UserError, match=r"state.json: format 2 is of a later release; this one reads up to 1"):
        read_state(path)


def test_a_field_that_came_later_is_no_planned_change_of_a_run(tmp_path: Path) -> None:
    values = {"run_dir": str(tmp_path), "max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    values |= {"model": {"vocab_size": 8, "seq_len": 1024, "num_layers": 1, "num_heads": 1, "hidden_size": 8}}
    values |= {"data": {"sources": {"a": {"path": str(tmp_path)}}}}
    data = cast(Data, SimpleNamespace(fingerprint="x"))
    config = TrainConfig.model_validate(values)
    optim = {name: value for name, value in config.optim.model_dump(mode="json").items() if name not in LATER["OptimConfig"]}
    before = hashlib.sha256(json.dumps(optim, sort_keys=True).encode()).hexdigest()[:8]
    assert digest_settings(config, data)["optim"] == before
    config = TrainConfig.model_validate({**values, "optim": {"lr_factors": {"*": 0.5}}})
    assert digest_settings(config, data)["optim"] != before
