"""Configuration: what is read, what is refused, and the words of the errors."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, Tag, model_validator

from megagpt import config
from megagpt.command import EXIT_BROKEN_PIPE, EXIT_CRASH, EXIT_DONE, EXIT_USER_ERROR, run_words
from megagpt.config import Config, Failure, UserError, by_kind, describe, dump, load, validate
from megagpt.data.open_data import DataConfig
from megagpt.settings_record import fingerprint

PROJECT = Path(__file__).resolve().parent.parent


class Red(Config):
    kind: Literal["red"] = "red"
    """Which."""
    heat: float = Field(default=1.0, ge=0)
    """How hot."""
    shade: int = 0


class Blue(Config):
    kind: Literal["blue"]
    """Which."""
    depth: int = 3
    """How deep."""
    shade: int = 0


class Inner(Config):
    lr: float = 3e-4
    """Peak."""


class Limits(Config):
    low: int = 0
    high: int = 9
    slow: int = 0

    @model_validator(mode="after")
    def _check_order(self) -> "Limits":
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class Toy(Config):
    name: str
    """Its name."""
    steps: int = Field(default=10, gt=0)
    inner: Inner = Inner()
    maybe: Inner | None = None
    parts: dict[str, Inner] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    nickname: str | None = None
    limits: Limits = Limits()
    colour: Annotated[Annotated[Red, Tag("red")] | Annotated[Blue, Tag("blue")], by_kind("red")] = Red()


class Outer(Config):
    data: DataConfig


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_whose_path_holds_an_equals_sign_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named by what was varied are common: runs/lr=0.1/config.yaml."""
    folder = tmp_path / "lr=0.1,steps=5"
    folder.mkdir()
    path = write(folder, "name: a\n")
    assert load(Toy, [path, "steps=7"]).steps == 7
    monkeypatch.chdir(folder)
    (folder / "lr=0.1.yaml").write_text("name: b\n")
    assert load(Toy, ["lr=0.1.yaml"]).name == "b"
    (folder / "steps=3").write_text("name: c\n")  # a setting's name wins; ./steps=3 is the file
    assert load(Toy, ["toy.yaml", "steps=3"]).steps == 3
    assert load(Toy, ["./steps=3"]).name == "c"
    with pytest.raises(UserError, match="cannot read the configuration file"):
        load(Toy, ["runs/lr=0.2/none.yaml"])
    for text in ("3", "[" + "1, " * 200 + "1]", "三" * 100):  # longer than a file's name may be
        with pytest.raises(UserError, match="stepps"):
            load(Toy, ["toy.yaml", f"stepps={text}"])


def test_words_override_the_file_and_dump_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner:\n  lr: 3e-4\n")
    config = load(Toy, [path, "inner.lr=1e-3", "steps=1e3"])
    assert (config.name, config.inner.lr, config.steps) == ("a", 0.001, 1000)
    assert load(Toy, [write(tmp_path, dump(config))]) == config
    assert fingerprint(config) == fingerprint(load(Toy, ["name=a", "inner.lr=0.001", "steps=1000"]))
    assert fingerprint(config) != fingerprint(load(Toy, ["name=b", "inner.lr=0.001", "steps=1000"]))


@pytest.mark.parametrize(
    ("word", "text"),
    [("name=no", "no"), ("name=3", "3"), ("name=KING: x", "KING: x"), ('name="a\\nb"', "a\nb"), ("name=[", "[")],
)
def test_a_text_field_takes_what_is_typed(word: str, text: str) -> None:
    assert load(Toy, [word]).name == text


def test_a_text_field_that_may_be_null_takes_what_is_typed_too() -> None:
    found = [load(Toy, ["name=a", f"nickname={text}"]).nickname for text in ("12345", "null", "bo", "true")]
    assert found == ["12345", None, "bo", "true"]


def test_only_null_is_null_in_a_text_field() -> None:
    found = {text: load(Toy, ["name=a", f"nickname={text}"]).nickname for text in ("", "#", "---", "C #4", "2024-02-30", "~")}
    assert found == {"": "", "#": "#", "---": "---", "C #4": "C #4", "2024-02-30": "2024-02-30", "~": None}


def test_an_empty_section_takes_words_and_is_refused_without(tmp_path: Path) -> None:
    assert load(Toy, [write(tmp_path, "name: a\nmaybe:\n")]).maybe is None
    path = write(tmp_path, "name: a\ninner:\nmaybe:\n")
    assert load(Toy, [path, "inner.lr=1", "maybe.lr=2"]) == Toy(name="a", inner=Inner(lr=1), maybe=Inner(lr=2))
    with pytest.raises(
        UserError, match=r"inner=null: a section is expected: leave it out for its defaults, or set inner\.FIELD"
    ):
        load(Toy, [path])


@pytest.mark.parametrize(
    ("text", "value"), [("0x10", 16), ("1_000", 1000), ("010", 10), ("-7", -7), ("0", 0), ("0b_", None), ("2024-02-30", None)]
)
def test_numbers_in_yaml(text: str, value: int | None, tmp_path: Path) -> None:
    path = write(tmp_path, f"name: a\nsteps: 5\ncolour:\n  shade: {text}\n")
    if value is None:
        with pytest.raises(UserError, match=r"colour\.shade=.*: input should be a valid integer"):
            load(Toy, [path])
    else:
        assert load(Toy, [path]).colour.shade == value


def test_a_word_that_changes_the_kind_leaves_the_other_kinds_fields_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ncolour:\n  heat: 2\n  shade: 7\n")
    assert load(Toy, [path]).colour == Red(heat=2, shade=7)
    assert load(Toy, [path, "colour.kind=blue", "colour.depth=5"]).colour == Blue(kind="blue", depth=5, shade=7)


ERRORS = [
    (["name=a", "steps=abc"], "steps='abc': input should be a valid integer"),
    (["name=a", "steps=-1"], "steps=-1: input should be greater than 0"),
    (["name=a", "stps=1"], "stps: no such field (did you mean steps?)"),
    (["name=a", "inner.rl=1"], "inner.rl: no such field (did you mean inner.lr?)"),
    (["name=a", "parts.left.rl=1"], "parts.left.rl: no such field (did you mean parts.NAME.lr?)"),
    (["name=a", "colour=blue"], "colour=blue: a section is expected: leave it out for its defaults, or set colour.kind=blue"),
    (["name=a", "colour=3"], "colour=3: a section is expected: leave it out for its defaults, or set colour.FIELD=..."),
    (["name=a", "inner=null"], "inner=null: a section is expected: leave it out for its defaults, or set inner.FIELD=..."),
    ([], "name: required, and not given"),
    (["name=a", "inner=3", "inner.lr=1"], "'inner' is a value in the file, not a section"),
    (["name=a", "colour.kind=green"], "colour.kind='green': one of 'red', 'blue' is expected"),
    (["name=a", "colour.kind=blue", "colour.heat=1"], "colour.heat: no such field for the kind that is set"),
    (["name=a", "colour.heat=-1"], "colour.heat=-1: input should be greater than or equal to 0"),
    (["a.yaml", "b.yaml"], "one configuration file is expected, 2 were given"),
    (["name=a", "steps=nan"], "steps='nan'"),
    (["none.yaml"], "none.yaml: cannot read the configuration file"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS)
def test_errors_name_file_field_value_and_rule(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load(Toy, words)
    assert message in str(raised.value)


def test_all_errors_come_at_once_with_their_source(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 0\nbogus: 1\n")
    with pytest.raises(UserError) as raised:
        load(Toy, [path])
    assert str(raised.value).splitlines()[0] == f"{path}:"
    assert len(str(raised.value).splitlines()) == 4


ORIGINS = [
    ("steps: 5", ["steps=0"], "command line: steps=0"),
    ("steps: 0", ["inner.lr=2"], "{path}: steps=0"),
    ("{}", ["colour.heat=-2"], "command line: colour.heat=-2"),
    ("{}", ["colour={kind: red, heat: -2}"], "command line: colour.heat=-2"),
    ("steps: 0", ["colour.heat=-1"], "{path} and the command line:\n"),
    ("limits: {low: 5, high: 9}", ["limits.low=10"], "{path} and the command line: limits: low=10 is above high=9"),
    ("limits: {low: 5, high: 1}", ["steps=3"], "{path}: limits: low=5 is above high=1"),
    ("limits: {low: 5, high: 1}", ["limits.slow=3"], "{path}: limits: low=5 is above high=1"),
    ("{}", ["limits.low=5", "limits.high=1"], "command line: limits: low=5 is above high=1"),
    ("{}", ["limits={low: 5, high: 1}"], "command line: limits: low=5 is above high=1"),
]


@pytest.mark.parametrize(("text", "words", "begin"), ORIGINS)
def test_errors_say_whether_file_or_command_line_set_the_field(text: str, words: list[str], begin: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"{text}\n")
    with pytest.raises(UserError) as raised:
        load(Toy, [path, "name=a", *words])
    assert str(raised.value).startswith(begin.format(path=path))


def test_earlier_names_of_settings_are_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config._warn_renamed.cache_clear()
    file = write(tmp_path, "data: {sources: {a: {path: x}}, mask_documents: true}\n")
    assert load(Outer, [file]).data == load(Outer, ["data.sources={a: {path: x}}", "data.mask_documents=true"]).data
    assert load(Outer, [file]).data.document_mask
    assert [record.message for record in caplog.records] == [
        "the setting mask_documents is now called document_mask; the earlier name is still read"
    ]
    today = tmp_path / "today.yaml"
    today.write_text("data: {sources: {a: {path: x}}, document_mask: true}\n")
    for path in (file, str(today)):
        for word in ("data.mask_documents=false", "data.document_mask=false"):
            assert not load(Outer, [path, word]).data.document_mask, "the command line wins over the file, by either name"
    both = write(tmp_path, "data: {sources: {a: {path: x}}, mask_documents: true, document_mask: true}\n")
    with pytest.raises(UserError, match="mask_documents is the earlier name of document_mask: only one of them can be set"):
        load(Outer, [both])


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a list"):
        load(Toy, [write(tmp_path, "- 1\n")])
    with pytest.raises(UserError, match="not valid YAML"):
        load(Toy, [write(tmp_path, "a: [1\n")])


def test_a_key_that_comes_twice_is_refused_with_the_file_and_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nsteps: 5\ninner:\n  lr: 1\nsteps: 6\n")
    with pytest.raises(UserError) as raised:
        load(Toy, [path])
    assert str(raised.value) == (
        f"{path}: not valid YAML: line 5: the key 'steps' comes twice in one section, first in line 2: keep one of them"
    )
    with pytest.raises(UserError, match=r"counts=.* is not valid YAML .*: line 1: the key 'x' comes twice"):
        load(Toy, ["name=a", "counts={x: 1, x: 2}"])


def test_a_word_that_a_later_one_replaces_is_named(caplog: pytest.LogCaptureFixture) -> None:
    config = load(Toy, ["name=a", "steps=5", "inner.lr=1", "inner={lr: 2}", "steps=6", "steps=7"])
    assert (config.steps, config.inner.lr) == (7, 2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "command line: 'inner.lr=1' has no effect: 'inner={lr: 2}' comes later",
        "command line: 'steps=5' has no effect: 'steps=6' comes later",
        "command line: 'steps=6' has no effect: 'steps=7' comes later",
    ]
    caplog.clear()
    load(Toy, ["name=a", "inner={lr: 2}", "inner.lr=1"])
    assert caplog.records == [], "a part of it is another"


@pytest.mark.parametrize("text", ["steps: " + "1" * 20_000, "steps: [" + "1, " * 50_000 + "1]", "steps: " + "x" * 100_000])
def test_a_wrong_value_is_shown_in_a_short_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load(Toy, [write(tmp_path, f"name: a\n{text}\n")])
    assert len(str(raised.value)) < 1000


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'name: a\n"\\e[2J": 1\nsteps: "\\e[2J\\u202e"\n')
    assert tool([path]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\\x1b[2J") == 2
    assert "\x1b" not in error
    assert "\u202e" not in error


READS_NOTHING = """
import os, subprocess, sys
reader, writer = os.pipe()
os.close(reader)
sys.exit(subprocess.run([sys.executable, "tools/inspect_data.py", "--help"], stdout=writer).returncode)
"""


def test_help_into_a_closed_pipe_ends_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", READS_NOTHING], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, "")


def test_help_lists_every_field_with_default_and_text() -> None:
    rows = describe(Toy)
    assert ("name", "required", "Its name.") in rows
    assert ("inner.lr", "0.0003", "Peak.") in rows
    assert ("parts.NAME.lr", "0.0003", "Peak.") in rows
    assert ("colour.depth", "3", "(kind=blue) How deep.") in rows
    assert [row for row in rows if row[0] in ("colour.kind", "colour.shade")] == [
        ("colour.kind", "red", "Which."),
        ("colour.shade", "0", ""),
    ]


def test_frozen_and_strict_about_keys() -> None:
    config = validate(Toy, {"name": "a"}, source="here")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"  # type: ignore[misc]


def tool(words: list[str], error: Exception | None = None, status: int | None = None) -> int:
    def run(config: Toy) -> int | None:
        if error is not None:
            raise error
        return status

    return run_words(Toy, run, "About.", words)


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(["name=a"]) == EXIT_DONE
    assert tool(["name=a", "--local_rank=3"], status=75) == 75
    assert tool(["--help"]) == EXIT_DONE
    assert "inner.lr" in capsys.readouterr().out
    assert tool(["name=a", "--print"], RuntimeError()) == EXIT_DONE
    assert "name: a" in capsys.readouterr().out
    assert tool(["name=a", "--wrong"]) == EXIT_USER_ERROR
    assert tool(["name=a"], UserError("no")) == EXIT_USER_ERROR
    assert tool(["name=a"], Failure("gone")) == EXIT_CRASH
    assert tool(["name=a"], OSError(28, "No space left on device", "/x/y")) == EXIT_CRASH
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "the disk is full while writing /x/y" in error
    assert tool(["name=a"], PermissionError(13, "Permission denied", "/x/y")) == EXIT_USER_ERROR
    assert "/x/y: Permission denied" in capsys.readouterr().err
    assert tool(["name=a", "--debug"], UserError("no")) == EXIT_USER_ERROR
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        tool(["name=a"], RuntimeError("a bug"))
