"""Charts as inline SVG whose colours are the page's CSS variables, so that they follow its light and dark style."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_INK, _MUTED, _GRID = "#0a0a01", "#0a0a02", "#0a0a03"
_SERIES = tuple(f"#0b0b{i:02x}" for i in range(1, 7))
_CSS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, start=1)
}
"""Stand-in colours that matplotlib draws with, and the variables that take their place."""

MAX_POINTS = 1200
"""Points per line at most: more cannot be seen, and the page stays small."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    """Number of its colour, from 1 to 6."""
    faint: bool = False
    """Drawn thin and pale, without a legend entry: raw values behind a smoothed line."""
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over steps. `restarts`: steps at which vertical dashed lines stand."""

    title: str
    lines: tuple[Line, ...]
    restarts: tuple[float, ...] = ()
    unit: str = ""
    log_y: bool = False
    size: tuple[float, float] = (4.2, 2.4)
    """Width and height in inches of 96 pixels."""
    y_limits: tuple[float, float] | None = None


def to_svg(chart: Chart) -> str:
    """The chart as an <svg> element that scales to its container. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif", "font.size": 8.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot()
        for step in chart.restarts:
            axes.axvline(step, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
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
                label="_" if line.faint else line.label,
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
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(stream.getvalue(), chart)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points that keep a line's extremes: of each stretch its lowest and highest value, in order."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    kept: list[int] = []
    stretches = MAX_POINTS // 2
    for i in range(stretches):
        indices = range(len(x) * i // stretches, len(x) * (i + 1) // stretches)
        kept += sorted({min(indices, key=y.__getitem__), max(indices, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average in which the past weighs `weight`, corrected for its empty start; NaN leaves it as it was."""
    result, mean, total = [], 0.0, 0.0
    for value in values:
        if value == value and abs(value) != float("inf"):
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total if total else float("nan"))
    return result


def _for_page(svg: str, chart: Chart) -> str:
    """Cut the prolog, put CSS variables and the page's font in, name the picture for screen readers."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = re.sub(r"<metadata>(?:[^<]++|<(?!/?metadata>))*+</metadata>", "", svg)
    head = f'<svg role="img" aria-label="{chart.title} over steps" '
    return re.sub(r'^<svg (?:(?:width|height)="[^"]*" ?)*', head, re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2))
