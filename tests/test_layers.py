"""The layers of the library: imports point down only, without cycles; the data half and reports need no torch nor DeepSpeed."""

import ast
import functools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the top down. A folder may import from its own line (while there is no cycle) and from any line below.
LAYERS = (
    ("quickstart", "serve", "plan", "report"),
    ("train", "corpus"),
    ("convert", "evaluate", "generate"),
    ("checkpoint",),
    ("engine", "monitor", "watchdog"),
    ("model", "data"),
    ("tokenizer", "distributed"),
    (
        "config",
        "strict_yaml",
        "terminal",
        "files",
        "documents",
        "command",
        "settings_record",
        "settings_fields",
        "output_list",
        "shipped",
        "__main__",
    ),
)
TORCH_FREE = (*LAYERS[-1], "tokenizer", "corpus", "data", "report")
"""Folders of which no module names torch, but for NEEDS_TORCH."""
NEEDS_TORCH = ("data.loader",)
ONLY_IN = {"deepspeed": "engine.deepspeed", "numba": "corpus.compiled"}
"""Packages that one module imports, for all."""

PROJECT = Path(__file__).resolve().parent.parent
LIBRARY = PROJECT / "megagpt"


def library_modules() -> dict[str, Path]:
    """Names below megagpt ("corpus.sources") and their files; packages are named by their folder ("corpus")."""
    modules = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = list(path.relative_to(LIBRARY).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            modules[".".join(parts)] = path
    return modules


@functools.cache
def imported_names(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Full names of everything that a file imports (of `from a import b` both a and a.b, either may be the module).

    What stands under `if TYPE_CHECKING` is never imported, and not counted.
    """
    names = set()
    for node in executed_nodes(ast.parse(path.read_text(encoding="utf-8")), inside_functions):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: relative import; write megagpt.{node.module}"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def executed_nodes(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """The nodes of a tree, without those under `if TYPE_CHECKING`, and if asked without the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef) and not inside_functions:
            continue
        yield node
        yield from executed_nodes(node, inside_functions)


def import_graph(modules: dict[str, Path], *, inside_functions: bool = True) -> dict[str, set[str]]:
    """For each module, the megagpt modules it imports (its own package's __init__ not counted for a submodule)."""
    graph = {}
    for name, path in modules.items():
        names = imported_names(path, inside_functions=inside_functions)
        found = {full.removeprefix("megagpt.") for full in names if full.startswith("megagpt.")}
        targets = {target for target in found if target in modules}
        # `from megagpt.corpus.runner.run_stage import run` names the package only on its way to the module.
        graph[name] = {t for t in targets if t != name and not any(other.startswith(f"{t}.") for other in targets)}
    return graph


def folder_of(name: str) -> str:
    """The folder that a module is in, or itself where it stands at the top."""
    return name.split(".")[0]


def layer_of(name: str) -> int:
    for number, folders in enumerate(LAYERS):
        if folder_of(name) in folders:
            return number
    raise AssertionError(f"megagpt.{name} has no place in the layer table of {Path(__file__).name}")


def reachable(graph: dict[str, set[str]], start: str) -> dict[str, list[str]]:
    """Every module that `start` imports, directly or not, with the chain of imports that leads there."""
    chains = {start: [start]}
    waiting = [start]
    while waiting:
        current = waiting.pop()
        for target in sorted(graph[current] - chains.keys()):
            chains[target] = [*chains[current], target]
            waiting.append(target)
    return chains


MODULES = library_modules()
GRAPH = import_graph(MODULES)


def is_torch_free(name: str) -> bool:
    return folder_of(name) in TORCH_FREE and name not in NEEDS_TORCH


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    upward = {target for target in GRAPH[name] if layer_of(target) < layer_of(name)}
    assert not upward, f"megagpt.{name} imports from a layer above it: {sorted(upward)}"


def test_no_import_cycles() -> None:
    # An import inside a function, to put off something heavy, closes no cycle at import time.
    graph = import_graph(MODULES, inside_functions=False)
    for name in MODULES:
        for target in graph[name]:
            back = reachable(graph, target).get(name)
            assert back is None, f"import cycle: {' -> '.join([name, *(back or [])])}"


@pytest.mark.parametrize("name", [name for name in MODULES if is_torch_free(name)])
def test_the_data_half_does_not_name_torch(name: str) -> None:
    for target, chain in reachable(GRAPH, name).items():
        heavy = {
            full for full in imported_names(MODULES[target]) if full.split(".")[0] in ("torch", "deepspeed", "transformers")
        }
        assert not heavy, f"{' -> '.join(chain)} imports {sorted(heavy)}"


KERNELS_WITHOUT_SCIPY = """
import sys
import numpy as np
from megagpt.corpus.text import word_kernels
word_kernels.number_plain_words(np.array([97, 32, 98], np.uint32))
print([name for name in sys.modules if name.startswith("scipy.linalg")])
import scipy.linalg
print(scipy.linalg.norm([3.0, 4.0]))
"""


def test_compiled_loops_do_not_load_scipy_and_others_still_can() -> None:
    done = subprocess.run([sys.executable, "-c", KERNELS_WITHOUT_SCIPY], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "5.0"]


def test_the_data_half_imports_where_torch_is_absent() -> None:
    names = [f"megagpt.{name}" for name in MODULES if is_torch_free(name)]
    code = "import importlib, sys\nsys.modules['torch'] = sys.modules['deepspeed'] = None\n"
    code += f"for name in {names!r}:\n    importlib.import_module(name)\nprint(len({names!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(names))]


MAX_REACH = {
    "extract_documents": 0.35,
    "filter_documents": 0.25,
    "dedup_documents": 0.25,
    "tokenize_documents": 0.25,
    "report_run": 0.25,
}
"""Tool -> the largest share of the library's lines that importing it may import (docs/architecture.md has today's)."""
NOT_REACHED = ("model", "engine", "train", "generate", "convert", "serve", "plan", "quickstart")
"""Folders that none of these tools imports."""


@pytest.mark.parametrize("tool", MAX_REACH)
def test_a_tool_imports_only_its_part_of_the_library(tool: str) -> None:
    code = (
        f"import sys, {tool}\nprint(*(name for name in sys.modules if name.split('.')[0] in ('megagpt', 'torch', 'deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT / "tools", capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    imported = {name.removeprefix("megagpt.") for name in done.stdout.split()}
    foreign = {folder_of(name) for name in imported} & {*NOT_REACHED, "torch", "deepspeed"}
    assert not foreign, f"tools/{tool}.py imports {sorted(foreign)}"
    assert "command" in imported
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    share = sum(lines[name] for name in imported & MODULES.keys()) / sum(lines.values())
    assert share <= MAX_REACH[tool], (
        f"tools/{tool}.py imports {share:.1%} of the library's lines, at most {MAX_REACH[tool]:.0%}"
    )


@pytest.mark.parametrize("package", ONLY_IN)
def test_only_one_file_imports(package: str) -> None:
    sources = {f"megagpt.{name}": path for name, path in MODULES.items()}
    sources |= {f"tools.{path.stem}": path for path in (PROJECT / "tools").glob("*.py")}
    users = {name for name, path in sources.items() if any(full.split(".")[0] == package for full in imported_names(path))}
    assert users == {f"megagpt.{ONLY_IN[package]}"}


def test_tools_are_not_imported_by_the_library() -> None:
    tools = {path.stem for path in (PROJECT / "tools").glob("*.py")} | {"tools"}
    for name, path in MODULES.items():
        assert not {full.split(".")[0] for full in imported_names(path)} & tools, f"megagpt.{name} imports a tool"


TESTS_OF_BENCH = "tests/test_benchmarks.py"


@pytest.mark.parametrize("folder", ["megagpt", "tools", "bench", "tests"])
def test_nothing_imports_bench_or_tests(folder: str) -> None:
    """Shared code is in the library; a benchmark and a test stand alone, but for the test of the benchmarks themselves."""
    of_tests = {path.stem for path in (PROJECT / "tests").rglob("*.py")} | {"tests"}
    for path in sorted((PROJECT / folder).rglob("*.py")):
        name = str(path.relative_to(PROJECT))
        refused = set() if folder == "tests" else of_tests
        refused |= set() if folder == "bench" or name == TESTS_OF_BENCH else {"bench"}
        found = {full.split(".")[0] for full in imported_names(path)} & refused
        assert not found, f"{name} imports {sorted(found)}"


@pytest.mark.slow
def test_the_figures_can_be_piped_to_a_reader_that_leaves() -> None:
    command = [sys.executable, str(PROJECT / "tests" / "support" / "structure.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE
