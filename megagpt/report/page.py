"""Pieces of a self-contained HTML page: escaped text, tables, tiles, bars, and the frame with its style."""

import html
from collections.abc import Sequence
from typing import Any

from megagpt.terminal import safe_text


def escape(value: Any) -> str:
    """Text for HTML, control characters escaped and right-to-left text isolated; None is a dash."""
    return "–" if value is None else html.escape(safe_text(str(value)))


def tile(label: str, value: str, note: str = "") -> str:
    """A figure with its name, and a line of small print."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="tile"><span>{escape(label)}</span><strong>{escape(value)}</strong>{small}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> str:
    """A table; the columns `numbers` are set flush right."""
    kind = [' class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(rows: Sequence[tuple[str, float, str, int]]) -> str:
    """Horizontal bars: (label, share of the full width from 0 to 1, text behind it, number of its colour)."""
    lines = [
        f'<div class="bar"><span>{escape(label)}</span><i><b style="width:{max(0.0, min(1.0, share)):.2%};'
        f'background:var(--series-{series})"></b></i><em>{escape(text)}</em></div>'
        for label, share, text, series in rows
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def card(title: str, body: str, *, wide: bool = False) -> str:
    """A titled box; nothing if there is nothing to show."""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def details(summary: str, body: str) -> str:
    """Text that opens with a click, set as code."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(body)}</pre></details>"


def page(title: str, body: str) -> str:
    """The whole document: no script, no resource from elsewhere, light and dark."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #16181d; --muted: #646a73; --grid: #e3e3de;
  --series-1: #2a6fd0; --series-2: #d9622b; --series-3: #16926a; --series-4: #b8860b; --series-5: #c2458a;
  --series-6: #6d5bd0; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1c1e22; --ink: #eceef1; --muted: #9ba2ac;
  --grid: #33363c; --series-1: #5b9bf0; --series-2: #f08a55; --series-3: #3dbb91; --series-4: #d9aa3c; --series-5: #e27bb3;
  --series-6: #9d8ff0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 10px; }
h3 { font-size: 13px; margin: 16px 0 6px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0; } .muted { color: var(--muted); }
.status { display: inline-block; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--grid); background: var(--card);
  font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px; margin-top: 14px; }
.card { grid-column: span 2; background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
.card.wide { grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 10px 14px; }
.tile span, .tile small { display: block; color: var(--muted); font-size: 12.5px; }
.tile strong { font-size: 22px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 560px); font-size: 13px; }
th { text-align: left; color: var(--muted); font-weight: 600; }
th, td { padding: 4px 26px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: grid; grid-template-columns: minmax(90px, 170px) 1fr minmax(110px, 230px); gap: 12px; align-items: center;
  font-size: 13px; margin: 5px 0; }
.bar i { background: var(--grid); border-radius: 4px; height: 14px; overflow: hidden; }
.bar b { display: block; height: 100%; min-width: 2px; border-radius: 4px; }
.bar em { font-style: normal; color: var(--muted); font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 ui-monospace, monospace; margin: 8px 0; }
blockquote { margin: 8px 0 16px; padding: 2px 0 2px 12px; border-left: 3px solid var(--grid); }
summary { cursor: pointer; font-size: 13px; margin: 4px 0; }
@media (max-width: 820px) { .card { grid-column: 1 / -1; } .bar { grid-template-columns: 100px 1fr; }
  .bar em { grid-column: 2; } }
@media print { .card, .tile { break-inside: avoid; } }
"""
