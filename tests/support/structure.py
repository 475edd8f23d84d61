"""The structure of the library in figures: modules per folder, imports between folders, cycles, and the reach of imports.

python tests/support/structure.py [PROJECT]     of this checkout, or of another one
"""

import ast
import signal
import sys
from collections import Counter
from pathlib import Path

TOOLS = (
    "train_model",
    "extract_documents",
    "filter_documents",
    "dedup_documents",
    "tokenize_documents",
    "report_run",
    "inspect_data",
    "plan_run",
)
"""Whose reach is printed."""


def names_torch(path: Path) -> bool:
    """Whether a file imports torch when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch")
        for node in tree.body
    )


def modules_of(project: Path) -> dict[str, Path]:
    """Dotted names below megagpt, and `tools.x`, with their files."""
    found = {}
    for path in sorted([*(project / "megagpt").rglob("*.py"), *(project / "tools").glob("*.py")]):
        parts = list(path.relative_to(project).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, modules: dict[str, Path], *, at_import: bool) -> set[str]:
    """The modules that a file imports; with `at_import` only those that are imported with it, not by a call later."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not guarded and not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found & modules.keys()


def reach(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything below megagpt that importing `start` imports."""
    seen, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen - {start}


def folder_of(name: str, modules: dict[str, Path]) -> str:
    """The package of a module; the ground's modules stand for themselves together as `megagpt`."""
    return name if modules[name].name == "__init__.py" else name.rpartition(".")[0]


def main(project: Path) -> None:
    """Print the figures."""
    modules = modules_of(project)
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    whole = sum(count for name, count in lines.items() if name.startswith("megagpt"))
    graph = {name: imports_of(path, modules, at_import=True) for name, path in modules.items()}
    folders = Counter(folder_of(name, modules) for name, path in modules.items() if path.name != "__init__.py")
    print("modules per folder: " + ", ".join(f"{name} {count}" for name, count in sorted(folders.items())))
    print(f"megagpt/: {sum(folders.values()) - folders['tools']} modules in {len(folders) - 1} folders, {whole:,} lines")
    longest = max((name for name in modules if name.startswith("megagpt")), key=lines.__getitem__)
    print(f"longest module: {longest}, {lines[longest]} lines")
    edges = [(folder_of(a, modules), folder_of(b, modules)) for a in modules for b in graph[a]]
    across = [edge for edge in edges if edge[0] != edge[1]]
    print(f"imports: {len(edges)}, {len(across)} of them between folders, in {len(set(across))} pairs of folders")
    cycles = [name for name in modules if name in {x for t in graph[name] for x in ({t} | reach(t, graph))}]
    print(f"modules in an import cycle: {', '.join(cycles) or 'none'}")
    for tool in (tool for tool in TOOLS if f"tools.{tool}" in modules):
        reached = reach(f"tools.{tool}", graph)
        reached_lines = sum(lines[name] for name in reached)
        count = sum(modules[name].name != "__init__.py" for name in reached)
        torch = "with" if any(names_torch(modules[name]) for name in reached) else "without"
        print(f"tools/{tool}.py imports {count} modules, {reached_lines:,} lines ({reached_lines / whole:.1%}), {torch} torch")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
