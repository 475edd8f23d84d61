"""docs/benchmarks.md from bench/results/*.json: a section per file, with date, machine, versions and command, tables and plots.

    python bench/document.py             writes docs/benchmarks.md and docs/benchmark_*.svg
    python bench/document.py check=true  status 1 if they are not what the results give

What a result file holds is said at measure.write_results. A file without a title is shown with its name and its flat values.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import PROJECT, RESULTS

PAGE = PROJECT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `python bench/document.py` from bench/results/*.json; do not edit. `make bench-cpu` measures the CPU part anew.
Times depend on the machine and on what else it does: what holds elsewhere are the ratios, each between programs that ran turn
about on the same cores with the same data. A cell `a (b to c)` is the median, smallest and largest of the repetitions.
What a peer wins is said under **Lost** in each section.
"""
NO_GPU = """No figures of a GPU: none was at hand. `bench/gpu.py` measures training on one (its docstring says how),
`python bench/gpu.py collect=FOLDER` adds them here; a test runs it on a CPU with tiny shapes.
"""
SHOWN_LAST = ("gpu",)
"""Sections at the end of the page, by file name; the others stand in the order of their titles."""
MAX_DEFAULT_ROWS = 60


def main(words: Sequence[str]) -> int:
    """Write the page and its plots, or compare them."""
    options = dict(word.split("=", 1) for word in words)
    documents = read_results(RESULTS)
    plots = {name: text for document in documents for name, text in draw(document).items()}
    wanted = {PAGE: page(documents), **{PAGE.parent / name: text for name, text in plots.items()}}
    different = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    different += [p for p in PAGE.parent.glob("benchmark_*.svg") if p not in wanted]
    if options.get("check") == "true":
        for path in different:
            print(f"{path.relative_to(PROJECT)} is not what bench/results gives: run python bench/document.py")
        return 1 if different else 0
    for path in different:
        if path in wanted:
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    print(f"{PAGE.relative_to(PROJECT)}: {len(documents)} results, {len(plots)} plots")
    return 0


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All result files, in the order of the page."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(documents, key=lambda d: (d["name"].startswith(SHOWN_LAST), title_of(d).lower()))


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    contents = [f"- [{title_of(d)}](#{anchor(title_of(d))})" for d in documents]
    absent = [] if any(document["name"] == "gpu" for document in documents) else [NO_GPU]
    return "\n".join([HEAD, *absent, *contents, ""]) + "\n" + "\n".join(section(document) for document in documents)


def section(document: Mapping[str, Any]) -> str:
    """One result file."""
    results = document["results"]
    parts = [f"## {title_of(document)}", results.get("about", ""), provenance(document)]
    for number, each in enumerate(tables_of(document)):
        own = each.get("title", "") != results.get("title")
        parts += [f"### {each['title']}" if own and each.get("title") else "", each.get("about", "") if own else ""]
        parts.append(table(each["rows"]))
        if plot_name(document, number, each):
            parts.append(f"![{each.get('title') or title_of(document)}]({plot_name(document, number, each)})")
    if "lost" in results:
        parts.append(f"**Lost.** {results['lost'] or 'Nothing.'}")
    return "\n\n".join(part for part in parts if part) + "\n"


def tables_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tables of a result: its own rows, then `tables`; without either, its plain values."""
    results = document["results"]
    tables = (
        [{"title": results.get("title", ""), "rows": results["rows"], "plot": results.get("plot")}] if "rows" in results else []
    )
    tables += results.get("tables", [])
    if not tables:
        plain = [{"name": name, "value": value} for name, value in flat(results)][:MAX_DEFAULT_ROWS]
        tables = [{"title": "", "rows": plain}]
    return [each for each in tables if each["rows"]]


def flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Numbers, texts and spreads below `values` with their dotted names; lists are left out."""
    if isinstance(values, Mapping) and not is_spread(values):
        return [pair for key, value in values.items() for pair in flat(value, f"{prefix}.{key}".lstrip("."))]
    skipped = isinstance(values, list) or prefix in ("title", "about", "lost")
    return [] if skipped else [(prefix, values)]


def provenance(document: Mapping[str, Any]) -> str:
    """When, on what, with which versions and command."""
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}"
    where = f"{machine['gpu']} ({where})" if machine.get("gpu") else where
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    peers = ", ".join(f"{name} {number}" for name, number in document["peers"].items())
    lines = [f"`{document['command']}` on {document['date']}, commit {document['commit'] or '?'}; {where}."]
    lines += [f"Versions: {versions}."] if versions else []
    lines += [f"Peers: {peers}."] if peers else []
    return " ".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown; a column is every key that some row has."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {name for name in names if any(_is_number(row.get(name)) or is_spread(row.get(name)) for row in rows)}
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("| " + " | ".join("---:" if name in numeric else "---" for name in names) + " |")
    lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as it is shown: three or four significant digits."""
    if value is None:
        return "–"
    if is_spread(value):
        middle = cell(value["median"])
        low, high = cell(value["min"]), cell(value["max"])
        return middle if low == middle == high else f"{middle} ({low} to {high})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    if isinstance(value, Mapping | list):
        return "`" + json.dumps(value).replace("|", "\\|") + "`"
    return str(value).replace("|", "\\|").replace("\n", " ")


def draw(document: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG of each plot of a result."""
    plots = {}
    for number, each in enumerate(tables_of(document)):
        name = plot_name(document, number, each)
        if name:
            plots[name] = svg(each["rows"], each["plot"])
    return plots


def plot_name(document: Mapping[str, Any], number: int, each: Mapping[str, Any]) -> str:
    """The file of a table's plot; empty if it has none."""
    return f"benchmark_{document['name']}_{number}.svg" if each.get("plot") else ""


def svg(rows: Sequence[Mapping[str, Any]], plot: Mapping[str, Any]) -> str:
    """Lines over numbers, or bars over names; the same bytes each time."""
    import io

    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "megagpt", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"})
    x, y, by = plot["x"], plot["y"], plot.get("by")
    shown = [row for row in rows if row.get(y) is not None]
    lines: dict[Any, list[Mapping[str, Any]]] = {}
    for row in shown:
        lines.setdefault(row.get(by) if by else "", []).append(row)
    bars = not all(_is_number(row[x]) for row in shown)
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.28 * len(shown)) if bars else (6, 3.6))
    for number, (label, members) in enumerate(lines.items()):
        values = [_middle(row[y]) for row in members]
        if bars:
            names = [str(row[x]) if not by else f"{label}, {row[x]}" for row in members]
            reach = [_reach(row[y]) for row in members]
            axes.barh(names, values, color=f"C{number}", xerr=[*zip(*reach, strict=True)], ecolor="0.3")
        else:
            axes.plot([row[x] for row in members], values, marker="o", label=str(label))
    _finish(axes, plot, bars=bars, labelled=len(lines) > 1 and not bars)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _finish(axes: Any, plot: Mapping[str, Any], *, bars: bool, labelled: bool) -> None:
    x, y = (plot[key].replace("_", " ") for key in ("x", "y"))
    if bars:
        axes.invert_yaxis()
    if plot.get("log"):
        axes.set_xscale("log")
        if not bars:
            axes.set_yscale("log")
    axes.set_xlabel(y if bars else x)
    axes.set_ylabel("" if bars else y)
    axes.grid(alpha=0.3, axis="x" if bars else "both")
    if labelled:
        axes.legend()


def is_spread(value: Any) -> bool:
    """Whether this is what measure.spread gives."""
    return isinstance(value, Mapping) and {"median", "min", "max"} <= set(value) and len(value) == 3


def title_of(document: Mapping[str, Any]) -> str:
    """The heading of a section."""
    return document["results"].get("title") or document["name"].replace("_", " ").capitalize()


def anchor(title: str) -> str:
    """GitHub's link target of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _middle(value: Any) -> float:
    return float(value["median"] if is_spread(value) else value)


def _reach(value: Any) -> tuple[float, float]:
    """How far below and above the middle the repetitions lie."""
    return (value["median"] - value["min"], value["max"] - value["median"]) if is_spread(value) else (0.0, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
