"""Draw charts as inline SVG whose colours are the page's CSS variables (light and dark), and as data for assets/charts.js."""

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.terminal import safe_text

_INK, _MUTED, _GRID = "#0a0a01", "#0a0a02", "#0a0a03"
_SERIES = tuple(f"#0b0b{i:02x}" for i in range(1, 7))
_CSS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, start=1)
}
"""Colour that matplotlib draws with -> the CSS variable that replaces it."""

MAX_POINTS = 1200
"""Most points per line: more cannot be seen, and would make the page large."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    """Number of the line's colour, from 1 to 6."""
    tokens: Sequence[float] | None = None
    """Tokens at each x, for an interactive chart over tokens."""
    hours: Sequence[float] | None = None
    """Hours since the first attempt began, at each x."""
    derived: bool = False
    """Whether the line is computed from another one (smoothed); an interactive chart computes it itself."""
    faint: bool = False
    """Whether the line is thin and pale, without a legend entry: raw values behind a smoothed line."""
    markers: bool = False


@dataclass(frozen=True)
class Mark:
    """A step from which a run resumed; `kind`: start or rewind."""

    step: float
    kind: str
    tokens: float | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over steps."""

    title: str
    lines: tuple[Line, ...]
    marks: "tuple[Mark, ...]" = ()
    """Vertical dashed lines: restarts and rewinds."""
    unit: str = ""
    log_y: bool = False
    size: tuple[float, float] = (4.2, 2.4)
    """Width and height in inches of 96 pixels."""
    y_limits: tuple[float, float] | None = None
    smooth: float = 0.0
    """Initial smoothing of an interactive chart: the weight of the past, 0 to 1."""


def to_svg(chart: Chart) -> str:
    """The chart as an <svg> element that scales to its container. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif", "font.size": 8.5}
    style["text.parse_math"] = False  # a source's name may hold $
    with matplotlib.rc_context(style):
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot()
        for mark in chart.marks:
            axes.axvline(mark.step, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        for line in chart.lines:
            x, y = thin(line.x, line.y)
            axes.plot(
                x,
                y,
                color=_SERIES[line.series - 1],
                linewidth=0.8 if line.faint else 1.6,
                alpha=0.35 if line.faint else 1.0,
                marker="o" if line.markers else None,
                markersize=3.5,
                label="_" if line.faint else safe_text(shortened(line.label)),
                zorder=2 if line.faint else 3,
            )
        if chart.log_y:
            axes.set_yscale("log")
        if chart.y_limits is not None:
            axes.set_ylim(*chart.y_limits)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_MUTED, length=0, which="both")
        axes.xaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_GRID)
        axes.set_xlabel("step", color=_MUTED)
        if chart.unit:
            axes.set_ylabel(chart.unit, color=_MUTED)
        if sum(not line.faint for line in chart.lines) > 1:
            axes.legend(frameon=False, labelcolor=_INK, handlelength=1.4)
        stream = io.StringIO()
        with warnings.catch_warnings():  # the reader's browser draws glyphs that matplotlib lacks
            warnings.filterwarnings("ignore", "Glyph", UserWarning)
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(stream.getvalue(), chart)


def shortened(label: str, most: int = 28) -> str:
    """A name that fits into a legend: a long one loses its middle."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[-most // 2 + 1 :]}"


def chart_data(chart: Chart) -> dict[str, Any]:
    """The chart as JSON for assets/charts.js: for each line x by axis, and y, thinned; None if y is not finite."""
    lines = []
    for line in chart.lines:
        if line.derived:
            continue
        kept = thin_indices(line.y)
        found: dict[str, Any] = {"label": safe_text(line.label), "series": line.series, "points": line.markers}
        for name, values in (("step", line.x), ("tokens", line.tokens), ("hours", line.hours), ("y", line.y)):
            found[name] = None if values is None else [_finite(values[i]) for i in kept]
        lines.append(found)
    return {
        "title": safe_text(chart.title),
        "log": chart.log_y,
        "smooth": chart.smooth,
        "limits": chart.y_limits,
        "wide": chart.size[0] > 6,
        "lines": lines,
        "marks": [{"step": m.step, "kind": m.kind, "tokens": m.tokens, "hours": m.hours} for m in chart.marks],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points that keep a line's extremes: the lowest and the highest value of each interval, in order."""
    kept = thin_indices(y)
    return [x[i] for i in kept], [y[i] for i in kept]


def thin_indices(y: Sequence[float]) -> list[int]:
    """The indices of the points that `thin` keeps."""
    if len(y) <= MAX_POINTS:
        return list(range(len(y)))
    kept: list[int] = []
    intervals = MAX_POINTS // 2
    for i in range(intervals):
        indices = range(len(y) * i // intervals, len(y) * (i + 1) // intervals)
        kept += sorted({min(indices, key=y.__getitem__), max(indices, key=y.__getitem__)})
    return kept


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with weight `weight` for the past, corrected for its empty start. NaN does not change it."""
    result, mean, total = [], 0.0, 0.0
    for value in values:
        if value == value and abs(value) != float("inf"):
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total if total else float("nan"))
    return result


def _for_page(svg: str, chart: Chart) -> str:
    """Cut the prolog, insert CSS variables and the page's font, and label the picture for screen readers."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = re.sub(r"<metadata>(?:[^<]++|<(?!/?metadata>))*+</metadata>", "", svg)
    head = f'<svg role="img" aria-label="{html.escape(safe_text(chart.title))} over steps" '
    return re.sub(
        r'^<svg (?:(?:width|height)="[^"]*" ?)*', lambda _: head, re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    )
