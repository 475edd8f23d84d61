"""The command `megagpt`: lists the tools, or runs one: `megagpt train_model gpt_124m run_dir=runs/first`."""

import ast
import difflib
import os
import sys
from importlib.util import find_spec
from typing import NoReturn

from megagpt import __version__
from megagpt.command import EXIT_DONE, EXIT_USER_ERROR
from megagpt.shipped import config_files, tool_file, tool_names
from megagpt.terminal import safe_line

USAGE = """\
megagpt TOOL [CONFIG] [key=value ...]   run a tool
megagpt TOOL --help                     its settings
megagpt --version                       the version"""

MORE = """\
CONFIG is a YAML file, or the name of one that ships with MegaGPT:
  {configs}
On several GPUs:
  torchrun --nproc-per-node 8 -m megagpt.tools.train_model gpt_124m run_dir=runs/first"""

NEEDS = {
    "corpus": ("selectolax", ("extract_documents",)),
    "train": (
        "torch",
        (
            "train_model",
            "evaluate_model",
            "generate_text",
            "inspect_checkpoints",
            "plan_run",
            "check_node",
            "report_run",
            "quickstart",
        ),
    ),
    "convert": ("transformers", ("export_model", "import_model")),
    "serve": ("fastapi", ("serve_model",)),
}
"""Extra -> a package that comes with it, and the tools that cannot start without it."""


def main() -> None:
    """Entry point of the command; ends the process with the tool's exit status, 2 for a tool that does not exist."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(words: list[str]) -> int:
    """List the tools, print help or version, or become the tool: this process then runs its file, as `python FILE` does."""
    name, *rest = words or ["--help"]
    if name in ("--help", "-h"):
        print(overview())
        return EXIT_DONE
    if name == "--version":
        print(f"megagpt {__version__}")
        return EXIT_DONE
    if name not in tool_names():
        close = difflib.get_close_matches(name.removesuffix(".py").replace("-", "_"), tool_names(), n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return _refuse(f"no such tool: {safe_line(name)}{hint}; `megagpt` lists the tools")
    for extra, (package, tools) in NEEDS.items():
        if name in tools and find_spec(package) is None:
            return _refuse(f"{name} needs {package}, which is not installed: install megagpt[{extra}]")
    return _become(name, rest)


def overview() -> str:
    """The usage and one line for each tool."""
    width = max(map(len, tool_names()))
    rows = [f"  {name:<{width}}  {about(name)}" for name in tool_names()]
    return "\n".join([USAGE, "", "Tools:", *rows, "", MORE.format(configs=" ".join(config_files()))])


def about(name: str) -> str:
    """The first line of a tool's docstring, read without running it."""
    tree = ast.parse(tool_file(name).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def _become(name: str, words: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, str(tool_file(name)), *words])


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    main()
