"""Pages of the site that are made from the code: home (README), settings, commands, API, changelog, contributing, security."""

import ast
import html
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from megagpt.config import Config, describe

PROJECT = Path(__file__).resolve().parent.parent

COPIES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Pages of the site that are files of the project's root."""

UNITS = {
    "seconds": "seconds", "minutes": "minutes", "hour": "per hour", "bytes": "bytes", "megabytes": "MB", "steps": "steps",
    "step": "step", "tokens": "tokens", "words": "words", "characters": "characters", "chars": "characters", "lines": "lines",
    "tflops": "TFLOP/s", "gb": "GB", "length": "characters", "samples": "samples", "documents": "documents",
    "gib": "GiB", "celsius": "°C",
    "fraction": "share, 0 to 1", "ratio": "ratio", "len": "tokens", "epochs": "epochs", "layers": "layers", "heads": "heads",
}  # fmt: skip
"""Unit by the last word of a setting's name."""

PUBLIC = (
    "megagpt.config",
    "megagpt.documents",
    "megagpt.corpus.filters.registry",
    "megagpt.data.open_data",
    "megagpt.data.shards",
    "megagpt.tokenizer.open_tokenizer",
    "megagpt.model.gpt",
    "megagpt.model.rope",
    "megagpt.engine.optim",
    "megagpt.train.config",
    "megagpt.checkpoint.admin",
    "megagpt.generate.sampling",
    "megagpt.evaluate.results",
    "megagpt.monitor.metrics",
)
"""Modules of the API page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages. The mkdocs event is called once per build."""
    if str(PROJECT / "tools") not in sys.path:
        sys.path.append(str(PROJECT / "tools"))
    pages = {name: (PROJECT / source).read_text(encoding="utf-8") for name, source in COPIES.items()}
    pages |= {"settings.md": settings_page(), "commands.md": commands_page(), "api.md": api_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=to_site_links(text, name in COPIES)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of pages in docs/ to files of the project's root go to their copies in the site."""
    for name, source in COPIES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


def to_site_links(text: str, from_root: bool) -> str:
    """Links of a file of the project's root as the site has them: `docs/x.md` is `x.md`, `CONTRIBUTING.md` its copy."""
    if not from_root:
        return text
    text = re.sub(r"\]\(docs/", "](", text)
    for name, source in COPIES.items():
        text = text.replace(f"]({source}", f"]({name}")
    return text


def settings_page() -> str:
    """Every setting of every tool: name, default, unit, meaning. Tools that share a configuration share a table."""
    tools: dict[type[Config], list[str]] = {}
    for tool in sorted(path.stem for path in (PROJECT / "tools").glob("*.py")):
        tools.setdefault(configuration(tool)[0], []).append(tool)
    parts = [
        "# Settings",
        "A setting is a key of the YAML file or a word `key=value` on the command line; dots reach into sections. "
        "`NAME` stands for a name that you choose. This page is made from the code when the site is built.",
    ]
    for config_class, names in tools.items():
        parts += [
            f"## {', '.join(names)} {{ #{names[0]} }}",
            "| setting | default, unit | meaning |\n|---|---|---|\n" + rows(config_class, names[0]),
        ]
    return "\n\n".join(parts) + "\n"


def rows(config_class: type[Config], tool: str) -> str:
    """The table's rows; each has an anchor `TOOL.SETTING`. A setting of several kinds of a section has a row per kind."""
    lines, anchors = [], set()
    for name, default, text in describe(config_class):
        anchor = "" if name in anchors else f'<span id="{tool}.{name}"></span>'
        anchors.add(name)
        shown = re.sub(r"([._])(?=.)", r"\1<wbr>", html.escape(name))
        lines.append(f"| {anchor}<code>{shown}</code> | {cell(default, code=True)} {unit(name)} | {cell(text)} |")
    return "\n".join(lines)


def commands_page() -> str:
    """What `--help` of every tool says before the settings, with a link to these."""
    parts = [
        "# Commands",
        "Each tool takes one YAML file and `key=value` settings. `--help` prints the text below and all settings, `--print` "
        "the resolved settings, `--debug` a traceback on errors. Exit status: 0 done, 2 usage or configuration error, 75 "
        "stopped on request, 1 anything else.",
    ]
    first: dict[type[Config], str] = {}
    for tool in sorted(path.stem for path in (PROJECT / "tools").glob("*.py")):
        config_class, about = configuration(tool)
        shared = first.setdefault(config_class, tool)
        parts += [f"## {tool}", f"```text\n{about.strip()}\n```", f"[Its settings](settings.md#{shared})."]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """The public modules, for mkdocstrings."""
    parts = [
        "# API",
        "The modules that a script of yours may import. Versions promise settings, files and commands, not these names.",
    ]
    for module in PUBLIC:
        parts += [f"## {module}", f"::: {module}"]
    return "\n\n".join(parts) + "\n"


def cell(text: str, code: bool = False) -> str:
    """Text inside a table: no pipes, no HTML, no Markdown but code."""
    if code:
        return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""
    pieces = re.split(r"(`[^`]*`)", text)
    plain = [
        piece if piece.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", html.escape(piece, quote=False)) for piece in pieces
    ]
    return "".join(plain).replace("|", "\\|")


def unit(name: str) -> str:
    """The unit that the name's last word says, else nothing."""
    return UNITS.get(name.rsplit(".", 1)[-1].rsplit("_", 1)[-1], "")


def configuration(tool: str) -> tuple[type[Config], str]:
    """The configuration class that tools/TOOL.py hands to `main`, and the file's docstring."""
    module = importlib.import_module(tool)
    tree = ast.parse((PROJECT / "tools" / f"{tool}.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main")
    return getattr(module, ast.unparse(call.args[0])), module.__doc__ or ""
