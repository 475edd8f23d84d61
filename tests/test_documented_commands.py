"""What the pages name is there: files, modules, and command lines, whose settings the tools accept."""

import ast
import importlib
import itertools
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megagpt.config import Config, UserError, describe, load

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((PROJECT / "docs").glob("*.md"))
HISTORY = {"LOG.md"}
"""Pages about the past: they may name what is gone."""
NO_PROSE = {"LOG.md", "benchmarks.md"}
"""Pages with words of programs that are no tools."""

FOLDERS = ("bench", "configs", "docker", "megagpt", "slurm", "tests", "tools")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})(?:/[\w.-]+)*/[\w-]+\.\w+(?![\w/])")
MODULE = re.compile(r"(?<=-m )bench(?:\.\w+)+")
TOOL = (re.compile(r"(?:^|/)tools/(\w+)\.py$"), re.compile(r"^megagpt\.tools\.(\w+)$"))
SHELL = re.compile(r"[&|;]|\d?>")
PLACEHOLDERS = {
    "CONFIG": "debug_cpu",
    "run.yaml": "debug_cpu",
    "my_run.yaml": "debug_cpu",
    "gpus=N": "gpus=8",
    "gpu=KIND": "gpu=h200",
    "step=K": "step=8",
}
NO_SETTINGS = {"api_key", "gt", "key", "launch", "resubmit", "splitter", "stages", "zero_division"}
"""Arguments of Python functions, and variables of slurm/env.sh."""
MADE_LATER = {"bench/results/gpu.json"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = {path for path in PATH.findall(text) if not re.search(r"NAME|/x\.py|/mine", path)} - MADE_LATER
    paths |= {module.replace(".", "/") + ".py" for module in MODULE.findall(text)}
    assert [path for path in sorted(paths) if not (PROJECT / path).is_file()] == []


def command_lines(text: str) -> list[list[str]]:
    """The words of every command line in code blocks and backquotes, comments left out, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError:  # a quotation in a line of output
            continue
    return found


def tool_calls(text: str) -> list[tuple[str, list[str]]]:
    """(tool, its words) of every command line with settings, of a tool's file, its module, or `megagpt TOOL`."""
    calls = []
    for line in command_lines(text):
        words = line[line.index("megagpt") + 1 :] if "megagpt" in line else line
        for i, word in enumerate(words):
            tool = (
                word if i == 0 and words is not line else next((match[1] for each in TOOL if (match := each.search(word))), "")
            )
            if tool:
                calls.append((tool, list(itertools.takewhile(lambda each: not SHELL.match(each), words[i + 1 :]))))
                break
    return [(tool, words) for tool, words in calls if words and tool.isidentifier()]


def configuration(tool: str) -> type[Config]:
    """The configuration class that tools/TOOL.py hands to `main`."""
    tree = ast.parse((PROJECT / "tools" / f"{tool}.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main")
    return getattr(importlib.import_module(tool), ast.unparse(call.args[0]))


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Config]]:
    """The configuration class of each tool; the project's folder is the current one."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(PROJECT / "tools")
    return {path.stem: configuration(path.stem) for path in (PROJECT / "tools").glob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tools_accept_the_command_lines_of_a_page(page: Path, configurations: dict[str, type[Config]]) -> None:
    for tool, words in tool_calls(page.read_text(encoding="utf-8")):
        assert tool in configurations, f"{page.name}: no tool {tool}"
        words = [PLACEHOLDERS.get(word, word.replace("=...", "=DIR")) for word in words if word != "..." and word[:2] != "--"]
        try:
            if words:
                load(configurations[tool], words)
        except UserError as error:
            pytest.fail(f"{page.name}: {tool} {shlex.join(words)}: {error}")


@cache
def setting_names(config_classes: frozenset[type[Config]]) -> re.Pattern[str]:
    """Matches the name of every setting; on a page about one section the section's name may be left out."""
    names = {name for each in config_classes for name, _, _ in describe(each)}
    names |= {name.split(".", n)[-1] for name in names for n in range(1, name.count(".") + 1)}
    patterns = [re.escape(name).replace("NAME", r"\w+") for name in names]
    return re.compile("|".join([*patterns, r"(shards|tasks|exercises|labels)\.\w+"]))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in NO_PROSE], ids=lambda page: page.name)
def test_settings_that_a_page_writes_with_a_value_exist(page: Path, configurations: dict[str, type[Config]]) -> None:
    setting = setting_names(frozenset(configurations.values()))
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`]+)`", prose)
    written = {name for each in code for name in re.findall(r"(?:^|(?<=\s))([a-z][a-z_0-9.]+)=(?!=)", each)} - NO_SETTINGS
    assert [name for name in sorted(written) if not setting.fullmatch(name)] == []


FORMATS = {
    "corpus/extraction/extract_documents.py": "extract",
    "corpus/filters/filter_documents.py": "filter",
    "corpus/dedup/dedup_documents.py": "dedup",
    "corpus/packing/tokenize_documents.py": "tokenize",
    "tokenizer/train_tokenizer.py": "train_tokenizer",
    "tokenizer/extended.py": "special_tokens.json",
    "output_list.py": "outputs.json",
    "checkpoint/on_disk.py": "state.json",
    "evaluate/results.py": "evaluations",
}
"""The module with the version of a format, and the format's name on the page."""


def test_the_page_of_formats_has_the_versions_of_the_code() -> None:
    text = " ".join((PROJECT / "docs" / "formats.md").read_text(encoding="utf-8").split())
    listed = text.partition("Versions today: ")[2]
    found = {}
    for path in (PROJECT / "megagpt").rglob("*.py"):
        if version := re.search(r"^FORMAT = (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[path.relative_to(PROJECT / "megagpt").as_posix()] = version[1]
    assert found.keys() == FORMATS.keys()
    assert [name for path, name in FORMATS.items() if f"{name} {found[path]}" not in re.split(r", |\. ", listed)] == []


def test_the_check_of_command_lines_finds_what_is_wrong(configurations: dict[str, type[Config]]) -> None:
    block = "torchrun --nproc-per-node 8 tools/train_model.py gpt_124m \\\n  run_dir=a optim.rate=1  # one\n"
    calls = tool_calls(f"```\n{block}```\nor `megagpt watch_run runs=b`")
    assert calls == [("train_model", ["gpt_124m", "run_dir=a", "optim.rate=1"]), ("watch_run", ["runs=b"])]
    with pytest.raises(UserError, match="rate"):
        load(configurations["train_model"], calls[0][1])
