"""Show a run's state on a terminal of at least 40 columns: a panel of one run, or a table of several. Needs rich, no torch."""

import time
from collections.abc import Sequence

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megagpt.monitor.metrics import Row
from megagpt.report.run_state import RunState, number
from megagpt.terminal import safe_line

STYLES = {"running": "bold green", "finished": "bold blue", "silent": "bold yellow", "stopped": "yellow", "hung": "bold red"}
EVENT_STYLES = {"rewind": "yellow", "skip": "yellow", "damaged": "yellow", "alert": "red", "watchdog": "red", "done": "blue"}
BARS = "▁▂▃▄▅▆▇█"
TWO_COLUMNS = 76
"""Least width, in characters, at which the figures are in two columns."""
WIDE_EVENTS = 60
"""Least width at which an event's words are beside its time and step."""
WIDE_TABLE = 60
"""Least width at which a table of runs has steps; below it shows their share of all."""
SHOWN_REASON = 160
"""Most characters that are shown of a reason or a problem."""


def run_panel(state: RunState, width: int, *, num_events: int = 6) -> RenderableType:
    """The panel of one run, `width` columns wide."""
    title, name = (
        Text(state.status, style=STYLES.get(state.status, "")),
        Text(safe_line(state.name), style="bold", overflow="fold"),
    )
    inner = width - 4
    parts: list[RenderableType] = [_progress(state, inner), _figures(state, inner)]
    if title.cell_len + 2 + name.cell_len <= inner - 2:
        title = Text.assemble(title, "  ", name)
    else:  # a title is cut off
        parts.insert(0, name)
    if len(state.losses) > 1:
        spark = sparkline(state.losses, max(8, inner - 7))
        parts.append(Text.assemble(("loss   ", "dim"), (spark, "cyan"), no_wrap=True, overflow="crop"))
    parts += [Text(f"! {safe_line(problem[:SHOWN_REASON])}", style="yellow") for problem in state.problems]
    events = state.events[-num_events:] if num_events else ()
    if events:
        parts.append(Text("last events", style="dim"))
        parts.append(_events(events, state.now, inner))
    return Panel(Group(*parts), title=title, box=ROUNDED, width=width)


def runs_table(states: Sequence[RunState], width: int) -> RenderableType:
    """A table with a row per run; values that do not fit into `width` columns are left out."""
    columns = ["run", "status", "step", "loss"]
    columns += ["tokens/s", "left"] if width >= 72 else []
    columns += ["MFU", "goodput", "attempts", "last row"] if width >= 104 else []
    table = Table(box=SIMPLE_HEAD, width=width, pad_edge=False, padding=(0, 1), header_style="dim")
    for name in columns:
        right = name not in ("run", "status")
        wraps = name in ("run", "step")
        ratio = 1 if name == "run" else None
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=not wraps, ratio=ratio)
    for state in states:
        cells = {
            "run": Text(safe_line(state.name)),
            "status": Text(state.status, style=STYLES.get(state.status, "")),
            "step": Text(_share(state, short=width < WIDE_TABLE)),
            "loss": Text(_shown(state.loss, ".4f")),
            "tokens/s": Text(_count(state.tokens_per_second)),
            "left": Text(span(state.eta_with_restarts_seconds or state.eta_seconds)),
            "MFU": Text(_shown(state.mfu, ".1%")),
            "goodput": Text(_shown(state.goodput, ".0%")),
            "attempts": Text(str(state.num_attempts)),
            "last row": Text("–" if state.last_row is None else f"{span(max(0.0, state.now - state.last_row))} ago"),
        }
        table.add_row(*(cells[name] for name in columns))
    notes = [
        Text(f"! {safe_line(state.name)}: {safe_line(problem[:SHOWN_REASON])}", style="yellow")
        for state in states
        for problem in state.problems
    ]
    return Group(table, *notes)


def sparkline(values: Sequence[float], width: int) -> str:
    """The shape of a series in `width` characters: the mean of each interval, scaled from the lowest to the highest."""
    width = min(width, len(values))
    means = []
    for i in range(width):
        interval = values[len(values) * i // width : len(values) * (i + 1) // width]
        means.append(sum(interval) / len(interval))
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def span(seconds: float | None) -> str:
    """A duration in its two largest units: 45 s, 3 min, 2 h 05, 4 d 03 h."""
    if seconds is None:
        return "–"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d}" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def _progress(state: RunState, width: int) -> RenderableType:
    of = f" / {state.max_steps:,}" if state.max_steps else ""
    share = f"  {state.step / state.max_steps:.1%}" if state.max_steps else ""
    line = Text.assemble(("step   ", "dim"), (f"{state.step:,}{of}{share}", "bold"))
    parts: list[RenderableType] = [line]
    if state.max_steps:
        filled = min(width, width * state.step // state.max_steps)
        parts.append(Text.assemble(("━" * filled, "green"), ("╌" * (width - filled), "dim"), no_wrap=True, overflow="crop"))
    if state.eta_seconds is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(state.now + state.eta_seconds))
        parts.append(Text.assemble(("left   ", "dim"), f"{span(state.eta_seconds)} ({end})"))
    if state.eta_with_restarts_seconds is not None:
        words = f"{span(state.eta_with_restarts_seconds)} with restarts as before"
        parts.append(Text.assemble(("left   ", "dim"), words))
    return Group(*parts)


def _figures(state: RunState, width: int) -> RenderableType:
    pairs = [
        ("loss", _shown(state.loss, ".4f")),
        ("valid", _shown(state.validation_loss, ".4f")),
        ("tokens/s", _count(state.tokens_per_second)),
        ("MFU", _shown(state.mfu, ".1%")),
        ("tokens", _count(state.tokens)),
        ("s/step", _shown(state.step_seconds, ".3g")),
        ("grad", _shown(state.grad_norm, ".3g")),
        ("lr", _shown(state.lr, ".2e")),
        ("data wait", _shown(state.data_wait, ".1%")),
        ("goodput", _shown(state.goodput, ".1%")),
        ("memory", _memory(state)),
        ("gpu", _gpu(state)),
        ("saved", "–" if state.saved_step is None else f"step {state.saved_step:,}"),
        ("next save", _next_save(state)),
        ("attempt", f"{state.attempt}" if state.attempt else "–"),
        ("last row", "–" if state.last_row is None else f"{span(max(0.0, state.now - state.last_row))} ago"),
    ]
    pairs = [(name, value) for name, value in pairs if value != "–"]
    num_columns = 3 if width >= 112 else 2 if width >= TWO_COLUMNS - 4 else 1
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(num_columns):
        table.add_column(style="dim", no_wrap=True, width=9)
        table.add_column(ratio=1, overflow="fold")
    for i in range(0, len(pairs), num_columns):
        cells = [cell for name, value in pairs[i : i + num_columns] for cell in (Text(name), Text(value))]
        table.add_row(*cells)
    return table


def _memory(state: RunState) -> str:
    parts = []
    if "memory_used_gib" in state.gpu:
        parts.append(f"{state.gpu['memory_used_gib']:.1f} GiB")
    if "peak_allocated_gib" in state.gpu:
        parts.append(f"peak {state.gpu['peak_allocated_gib']:.1f}")
    return ", ".join(parts) or "–"


def _gpu(state: RunState) -> str:
    units = {"utilisation_percent": " %", "power_watts": " W", "temperature_celsius": " °C"}
    parts = [f"{state.gpu[name]:.0f}{unit}" for name, unit in units.items() if name in state.gpu]
    parts += [f"throttled: {safe_line(state.throttled)}"] if state.throttled else []
    return ", ".join(parts) or "–"


def _next_save(state: RunState) -> str:
    if state.next_save_step is None:
        return "–"
    when = "" if state.next_save_seconds is None else f" in {span(state.next_save_seconds)}"
    advice = state.advised_save_every_steps
    return f"step {state.next_save_step:,}{when}" + (f" (advised: every {advice:,})" if advice else "")


def _events(events: Sequence[Row], now: float, width: int) -> RenderableType:
    """The newest first. A long one continues beside its time and step, or below them if there is little width."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    below: list[RenderableType] = []
    for row in reversed(events):
        head = f"{span(max(0.0, now - row['time'])):>8} ago  step {row['step']:,}"
        words = Text(_event_words(row), style=EVENT_STYLES.get(row["kind"], ""), overflow="fold")
        table.add_row(head, words)
        if len(head) + 2 + words.cell_len <= width:
            below.append(Text.assemble((head, "dim"), "  ", words))
        else:
            below += [Text(head, style="dim"), Padding(words, (0, 0, 0, 4))]
    return table if width >= WIDE_EVENTS else Group(*below)


def _event_words(row: Row) -> str:
    words = [str(row["kind"])]
    for name in ("alert", "reason", "change", "what", "cause"):
        if isinstance(row.get(name), str):
            words.append(row[name][:SHOWN_REASON])
    for name in ("loss", "bits_per_byte"):
        value = number(row.get(name))
        if value is not None:
            words.append(f"{name} {value:.4f}")
    if row["kind"] == "start":
        words.append("from a checkpoint" if row.get("resumed") else "from fresh weights")
    return safe_line("  ".join(words))


def _share(state: RunState, *, short: bool) -> str:
    if not state.max_steps:
        return f"{state.step:,}"
    return f"{state.step / state.max_steps:.0%}" if short else f"{state.step:,}/{state.max_steps:,}"


def _shown(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):  # below, all digits are shorter
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"
