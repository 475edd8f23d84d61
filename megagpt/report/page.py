"""A self-contained HTML page: its parts as plain data, rendered by jinja2 templates that escape everything.

All text reaches a page through the templates' autoescape. A content security policy lets a browser run only the page's own
scripts, by their hashes, and load nothing.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, TypeAlias

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megagpt.report.charts import Chart, chart_data, to_svg
from megagpt.terminal import safe_text

CHART_SCRIPTS = ("uPlot.iife.min.js", "charts.js")
NUM_BARS = 40
"""Number of bars in the drawing of a statistic."""


@dataclass(frozen=True)
class Tile:
    """A figure with its label, and a line of small print."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the columns in `numbers` are aligned to the right. None is shown as a dash."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[int] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: (label, share of the full width from 0 to 1, text after it, number of its colour)."""

    rows: Sequence[tuple[str, float, str, int]]
    kind: ClassVar[str] = "bars"


@dataclass(frozen=True)
class Heading:
    """A heading inside a card."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Note:
    """A line of muted text."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Quote:
    """A quoted text, as parts of which some are marked; `lead` is bold before it, `where` names its source."""

    parts: Sequence[tuple[str, bool]]
    lead: str = ""
    where: str = ""
    kind: ClassVar[str] = "quote"


@dataclass(frozen=True)
class Code:
    """Text shown as code."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Fold:
    """Blocks that a click shows."""

    summary: str
    blocks: "Sequence[Block]"
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Picture:
    """A chart: an SVG drawing, and an interactive chart if scripts run."""

    chart: Chart
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Pair:
    """Two lists of blocks with headings, side by side; on a phone one is below the other."""

    heads: tuple[str, str]
    left: "Sequence[Block]"
    right: "Sequence[Block]"
    kind: ClassVar[str] = "pair"


@dataclass(frozen=True)
class Threshold:
    """A statistic's distribution with a threshold that the reader can move; without scripts it shows the set threshold.

    steps: (value, share of the documents), by value. dropped: share of the documents above `limit` (if it is a maximum) or
    below it.
    """

    name: str
    limit: float
    is_maximum: bool
    steps: Sequence[tuple[float, float]]
    dropped: float
    note: str = ""
    kind: ClassVar[str] = "threshold"

    @property
    def shown_limit(self) -> str:
        """The threshold, in at most six digits."""
        return f"{self.limit:.6g}"

    @property
    def data(self) -> str:
        """The JSON that the script reads."""
        steps = [[float(f"{value:.5g}"), float(f"{share:.4g}")] for value, share in self.steps]
        return orjson.dumps({"limit": self.limit, "max": self.is_maximum, "steps": steps, "dropped": self.dropped}).decode()

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of the drawing: the threshold, and all values but those of the outermost 1 % of the documents per side."""
        position, shown = 0.0, []
        for value, share in self.steps:
            if position + share >= 0.01 and position <= 0.99:
                shown.append(value)
            position += share
        low, high = min([*shown, self.limit]), max([*shown, self.limit])
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    @property
    def bars(self) -> list[tuple[float, float, bool]]:
        """(left edge, height, whether the bar is dropped) of NUM_BARS bars, in percent of the drawing."""
        low, high = self.bounds
        sums = [0.0] * NUM_BARS
        for value, share in self.steps:
            place = int((value - low) / (high - low) * NUM_BARS)
            sums[max(0, min(NUM_BARS - 1, place))] += share
        most, width = max(sums), 100 / NUM_BARS
        middles = [low + (i + 0.5) * (high - low) / NUM_BARS for i in range(NUM_BARS)]
        is_dropped = [middle > self.limit if self.is_maximum else middle < self.limit for middle in middles]
        return [(i * width, 100 * (share / most) ** 0.5, is_dropped[i]) for i, share in enumerate(sums)]

    @property
    def at(self) -> float:
        """The position of the threshold, in percent of the drawing."""
        low, high = self.bounds
        return 100 * (self.limit - low) / (high - low)


Block: TypeAlias = Table | Bars | Heading | Note | Quote | Code | Fold | Picture | Pair | Threshold


@dataclass(frozen=True)
class Card:
    """A titled box; left out if it has no blocks."""

    title: str
    blocks: Sequence[Block]
    wide: bool = True


@dataclass(frozen=True)
class _Drawn:
    """A picture for the template; `svg` is our own markup."""

    svg: Any
    number: int
    kind: ClassVar[str] = "picture"


def page(
    title: str,
    cards: Iterable[Card],
    *,
    heading: str,
    status: str = "",
    note: str = "",
    tiles: Sequence[Tile] = (),
    problems: Sequence[str] = (),
) -> str:
    """The HTML document, light and dark, without external resources. problems: lines that are shown first."""
    charts: list[Chart] = []
    shown = [
        Card(card.title, [_draw(block, charts) for block in card.blocks], card.wide)  # pyright: ignore[reportArgumentType]
        for card in cards
        if card.blocks
    ]
    scripts = [_asset(name) for name in CHART_SCRIPTS] if charts else []
    if any(_has_threshold(card.blocks) for card in shown):
        scripts.append(_asset("thresholds.js"))
    style = _asset("style.css") + (_asset("uPlot.min.css") if charts else "")
    data = orjson.dumps([chart_data(chart) for chart in charts]).decode().replace("<", "\\u003c")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            heading=heading,
            status=status,
            note=note,
            tiles=tiles,
            problems=problems,
            cards=shown,
            policy=_policy(scripts),
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
            data=Markup(data) if charts else None,
        )
        .lstrip()
    )


def _draw(block: Block, charts: list[Chart]) -> "Block | _Drawn":
    if not isinstance(block, Picture):
        return block
    charts.append(block.chart)
    return _Drawn(Markup(to_svg(block.chart)), len(charts) - 1)


def _has_threshold(blocks: Sequence[Any]) -> bool:
    return any(isinstance(b, Threshold) or (isinstance(b, Fold) and _has_threshold(b.blocks)) for b in blocks)


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"


@cache
def _asset(name: str) -> str:
    return (files("megagpt.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    return Environment(
        loader=PackageLoader("megagpt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )


def _finalize(value: Any) -> Any:
    """A value as the templates print it: control characters escaped, right-to-left text isolated, None as a dash."""
    return value if hasattr(value, "__html__") else "–" if value is None else safe_text(str(value))
