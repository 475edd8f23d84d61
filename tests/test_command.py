"""The command `megagpt`, configurations by name, and commands as an installed wheel has them."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagpt import __version__
from megagpt.__main__ import NEEDS, about, run_command
from megagpt.config import UserError, load
from megagpt.shipped import as_installed, config_files, find_config, tool_file, tool_names
from megagpt.train.config import TrainConfig


def test_it_lists_every_tool_with_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tool_names() == sorted(path.stem for path in (project / "tools").glob("*.py"))
    for name in tool_names():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:<19}  {about(name)}"]
        assert about(name).endswith("."), f"tools/{name}.py: its docstring does not begin with one whole line"


def test_version_and_unknown_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"
    assert run_command(["train-model"]) == 2
    assert "no such tool: train-model (did you mean train_model?)" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {tool for _, tools in NEEDS.values() for tool in tools} <= {*tool_names()}
    monkeypatch.setattr("megagpt.__main__.find_spec", lambda name: None)
    assert run_command(["serve_model"]) == 2
    assert capsys.readouterr().err == "error: serve_model needs fastapi, which is not installed: install megagpt[serve]\n"


def test_it_becomes_the_tool(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megagpt", "watch_run", f"run_dir={tmp_path}/none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert f"{tmp_path}/none/metrics.jsonl" in done.stderr


def test_configurations_are_found_by_name_and_a_local_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = config_files()["gpt_124m"]
    for word in ("gpt_124m", "gpt_124m.yaml", "train/gpt_124m", "configs/train/gpt_124m.yaml"):
        assert find_config(word) == shipped, word
    for word in ("other/gpt_124m", "/x/gpt_124m.yaml", "corpus/gpt_124m.yaml", "gpt_124m.yml", "x" * 300, ""):
        assert find_config(word) is None, word
    assert load(TrainConfig, ["gpt_124m", "run_dir=r"]) == load(TrainConfig, [str(shipped), "run_dir=r"])
    (tmp_path / "gpt_124m").mkdir()  # a folder is no configuration
    assert find_config("gpt_124m") == shipped
    (tmp_path / "gpt_124m.yaml").write_text("run_dir: mine\n", encoding="utf-8")
    assert find_config("gpt_124m") == Path("gpt_124m.yaml")


def test_names_of_configurations_are_unique(project: Path) -> None:
    assert len(config_files()) == len(list((project / "configs").rglob("*.yaml")))


def test_an_unknown_name_lists_those_near_it() -> None:
    with pytest.raises(UserError, match=r"^gpt_125m: no such configuration file \(did you mean gpt_124m"):
        load(TrainConfig, ["gpt_125m"])
    with pytest.raises(UserError, match=r"^nothing: no such configuration file; those that ship: .*gpt_7b"):
        load(TrainConfig, ["nothing"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    python tools/plan_run.py configs/train/gpt_7b.yaml gpus=64", "    megagpt plan_run gpt_7b gpus=64"),
        (
            ".venv/bin/torchrun --nproc-per-node 8 tools/train_model.py configs/train/gpt_124m.yaml",
            "torchrun --nproc-per-node 8 -m megagpt.tools.train_model gpt_124m",
        ),
        ("(tools/inspect_checkpoints.py run_dir=a merge=true)", "(megagpt inspect_checkpoints run_dir=a merge=true)"),
        ("/home/me/tools/train_model.py: no such file", "/home/me/tools/train_model.py: no such file"),
        ("tools/mine.py configs/train/mine.yaml", "tools/mine.py configs/train/mine.yaml"),
    ],
)
def test_commands_are_written_as_an_installed_wheel_has_them(text: str, expected: str) -> None:
    assert as_installed(text, in_checkout=False) == expected
    assert as_installed(text) == text


@pytest.mark.parametrize("name", tool_names())
def test_no_help_of_a_wheel_names_files_of_a_checkout(name: str) -> None:
    text = as_installed(tool_file(name).read_text(encoding="utf-8").split('"""')[1], in_checkout=False)
    assert f"megagpt {name}" in text or f"megagpt.tools.{name}" in text
    assert "tools/" not in text
    assert "configs/" not in text
    assert "make " not in text
