"""The charts of a run's report and of a comparison: their lines, axes and marks."""

from collections.abc import Sequence

import numpy as np

from megagpt.monitor.metrics import Row
from megagpt.report.charts import Chart, Line, Mark, smoothed
from megagpt.report.page import Block, Card, Note, Picture, Table
from megagpt.report.run_facts import Facts, column
from megagpt.report.run_state import number

SMALL = (
    ("Learning rate", "lr", ""),
    ("Gradient norm", "grad_norm", "before clipping"),
    ("Throughput", "tokens_per_second", "tokens per second"),
)
SHARES = (
    *("accuracy", "accuracy_per_character", "acc", "acc_norm", "exact_match", "exact_match,strict-match", "final_number"),
    *("macro_f1", "precision", "recall", "f1", "rouge1", "rougeL"),
)
"""Scores from 0 to 1 that are drawn, by their names in tasks, the harness and exercises."""
MAX_COMPARED = 6
"""Most runs in one comparison: the number of colours."""
MAX_EXPORTS = 10
"""Most exports that are listed."""


def loss_card(facts: Facts) -> Card:
    """Training and validation losses over steps."""
    train, evaluated = facts.metrics.of_kind("train"), facts.metrics.of_kind("evaluate")
    lines = []
    rows, losses = column(train, "loss")
    weight = 1 - 1 / min(100.0, max(3.0, len(losses) / 50))
    is_smoothed = len(losses) > 30
    if losses:
        lines.append(line("training", rows, losses, 1, facts, faint=is_smoothed))
    if is_smoothed:
        lines.append(Line("training (smoothed)", [row["step"] for row in rows], smoothed(losses, weight), 1, derived=True))
    names = sorted({name for row in evaluated for name in _sources(row)})
    if len(names) != 1 and evaluated:
        lines.append(line("validation", *column(evaluated, "loss"), 2, facts, markers=True))
    for i, name in enumerate(names[:4]):
        found = [{**row, **_sources(row)[name]} for row in evaluated if name in _sources(row)]
        series = 2 if len(names) == 1 else 3 + i
        lines.append(line(f"validation: {name}", *column(found, "loss"), series, facts, markers=True))
    values = [value for item in lines for value in item.y]
    if not values:
        return Card("Loss", [])
    chart = Chart(
        "Loss",
        tuple(lines),
        marks(facts),
        unit="nats per token",
        size=(11.0, 3.6),
        y_limits=limits(values),
        smooth=weight if is_smoothed else 0.0,
    )
    blocks: list[Block] = [Picture(chart)]
    if chart.marks:
        blocks.append(Note("dashed lines: steps from which a later attempt, or a rewind (in colour), resumed"))
    if len(names) > 4:
        blocks.append(Note(f"not drawn: {', '.join(names[4:])}"))
    return Card("Loss", blocks)


def source_losses_card(facts: Facts) -> Card:
    """Training loss over steps, by source, of the sources with the most targets; no chart if rows have no sources."""
    train, title = facts.metrics.of_kind("train"), "Training loss by source"
    targets: dict[str, float] = {}
    for row in train:
        for name, score in _sources(row).items():
            targets[name] = targets.get(name, 0.0) + (number(score.get("targets")) or 0.0)
    lines = []
    for name in (names := sorted(targets, key=lambda name: (-targets[name], name)))[:MAX_COMPARED]:
        rows, losses = column([{**row, **_sources(row)[name]} for row in train if name in _sources(row)], "loss")
        is_smoothed = len(losses) > 30
        values = smoothed(losses, 1 - 1 / min(100.0, max(3.0, len(losses) / 50))) if is_smoothed else losses
        if losses:
            lines.append(line(f"{name} (smoothed)" if is_smoothed else name, rows, values, len(lines) + 1, facts))
    if not lines:
        return Card(title, [])
    y_limits = limits([value for item in lines for value in item.y])
    blocks: list[Block] = [
        Picture(Chart(title, tuple(lines), marks(facts), unit="nats per token", size=(11.0, 3.0), y_limits=y_limits))
    ]
    if len(names) > MAX_COMPARED:
        blocks.append(Note(f"not drawn: {', '.join(names[MAX_COMPARED:])}"))
    return Card(title, blocks)


def exports_card(facts: Facts) -> Card:
    """The results of the exports during training, newest first."""
    rows = facts.metrics.of_kind("export")[::-1]
    cells = []
    for row in rows[:MAX_EXPORTS]:
        seconds = number(row.get("duration"))
        duration = "" if seconds is None else f"{seconds:,.0f} s"
        cells.append(
            (str(row.get("of_step", row["step"])), str(row.get("status", "")), duration, str(row.get("message") or ""))
        )
    if not cells:
        return Card("Exports", [])
    blocks: list[Block] = [Table(("step", "status", "took", "message"), cells, numbers=(0, 2))]
    if len(rows) > MAX_EXPORTS:
        blocks.append(Note(f"{len(rows) - MAX_EXPORTS} earlier exports are not listed"))
    return Card("Exports", blocks, wide=False)


def small_cards(facts: Facts) -> list[Card]:
    """Learning rate, gradient norm and throughput."""
    train, cards = facts.metrics.of_kind("train"), []
    for title, key, unit in SMALL:
        rows, values = column(train, key)
        if values:
            positive = min(values) >= 0 and max(values) > 0
            y_limits = (0.0, 1.08 * max(values)) if positive else None
            chart = Chart(title, (line(title, rows, values, 1, facts),), marks(facts), unit=unit, y_limits=y_limits)
            cards.append(Card(title, [Picture(chart)], wide=False))
    return cards


def mixture_card(facts: Facts) -> Card:
    """Each source's share of the samples over steps, and its total share beside the share by the weights."""
    spans, title = facts.consumed, "Mixture as consumed"
    names = list(dict.fromkeys(name for span in spans for name in span.samples))
    if len(names) < 2:
        return Card(title, [])
    totals = {name: sum(span.samples.get(name, 0) for span in spans) for name in names}
    asked = {name: sum(span.configured.get(name, 0.0) for span in spans) for name in names}
    names.sort(key=lambda name: -totals[name])
    steps, whole = [span.step for span in spans], max(1, sum(totals.values()))
    lines = [
        Line(name, steps, [span.samples.get(name, 0) / max(1, sum(span.samples.values())) for span in spans], i + 1)
        for i, name in enumerate(names[:MAX_COMPARED])
    ]
    rows = [(name, f"{totals[name]:,}", f"{totals[name] / whole:.2%}", f"{asked[name] / whole:.2%}") for name in names]
    chart = Chart(title, tuple(lines), marks(facts), unit="share of the samples", size=(11.0, 3.0), y_limits=(0.0, 1.0))
    blocks: list[Block] = [Picture(chart), Table(("source", "samples", "share", "by the weights"), rows, numbers=(1, 2, 3))]
    if len(names) > MAX_COMPARED:
        blocks.append(Note(f"not drawn: {', '.join(names[MAX_COMPARED:])}"))
    return Card(title, blocks)


def score_cards(facts: Facts) -> list[Card]:
    """A chart for each task that was scored during training: its accuracies, F1 or ROUGE over steps."""
    rows = facts.metrics.of_kind("score") or [row for row in facts.metrics.of_kind("evaluate") if "scores" in row]
    tasks = sorted({name for row in rows for name in _scores(row)})
    cards = []
    for task in tasks:
        found = [{**row, **_scores(row)[task]} for row in rows if task in _scores(row)]
        lines = []
        for name in SHARES:
            of_rows, values = column(found, name)
            if values and len(lines) < MAX_COMPARED:
                lines.append(line(name, of_rows, values, len(lines) + 1, facts, markers=True))
        if lines:
            y_limits = limits([value for item in lines for value in item.y])
            cards.append(
                Card(f"Scores: {task}", [Picture(Chart(f"Scores: {task}", tuple(lines), y_limits=y_limits))], wide=False)
            )
    return cards


def compared_cards(runs: Sequence[Facts], names: Sequence[str]) -> list[Card]:
    """One chart per value, one line per run."""
    cards = []
    for title, kind, key, unit in (
        ("Training loss", "train", "loss", "nats per token"),
        ("Validation loss", "evaluate", "loss", "nats per token"),
        *((title, "train", key, unit) for title, key, unit in SMALL),
    ):
        lines = []
        for i, (facts, name) in enumerate(zip(runs, names, strict=True)):
            rows, values = column(facts.metrics.of_kind(kind), key)
            if values:
                lines.append(line(name, rows, values, i + 1, facts, markers=kind == "evaluate"))
        if lines:
            wide = key == "loss"
            y_limits = limits([value for item in lines for value in item.y])
            size = (11.0, 3.6) if wide else (4.2, 2.4)
            cards.append(Card(title, [Picture(Chart(title, tuple(lines), unit=unit, size=size, y_limits=y_limits))], wide))
    return cards


def line(
    label: str,
    rows: Sequence[Row],
    values: list[float],
    series: int,
    facts: Facts,
    *,
    faint: bool = False,
    markers: bool = False,
) -> Line:
    """A line of values of rows over steps and hours, and over tokens if train rows have them."""
    begun = _begun(facts)
    counts = _tokens_at(facts, rows)
    return Line(
        label,
        [row["step"] for row in rows],
        values,
        series,
        tokens=counts,
        hours=[(row["time"] - begun) / 3600 for row in rows],
        faint=faint,
        markers=markers,
    )


def marks(facts: Facts) -> tuple[Mark, ...]:
    """The steps from which later attempts and rewinds resumed."""
    begun = _begun(facts)
    rows = [row for row in facts.metrics.rows if row["kind"] in ("start", "rewind") and row["step"] > 0]
    return tuple(Mark(row["step"], row["kind"], number(row.get("tokens")), (row["time"] - begun) / 3600) for row in rows)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of the y axis that show all but the largest 1 % of the values, since the first steps would flatten the rest."""
    ordered = sorted(values)
    top, bottom = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], ordered[0]
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def _begun(facts: Facts) -> float:
    rows = facts.metrics.all_rows
    return rows[0]["time"] - sum(rows[0].get("seconds", {}).values()) if rows else 0.0


def _tokens_at(facts: Facts, rows: Sequence[Row]) -> list[float] | None:
    """Training tokens at each row's step, from the train rows around it: an evaluation's own `tokens` count other tokens."""
    known, counts = column(facts.metrics.of_kind("train"), "tokens")
    if not known:
        return None
    return np.interp([row["step"] for row in rows], [row["step"] for row in known], counts).tolist()


def _scores(row: Row) -> dict[str, dict[str, float]]:
    scores = row.get("scores")
    return {name: found for name, found in scores.items() if isinstance(found, dict)} if isinstance(scores, dict) else {}


def _sources(row: Row) -> dict[str, dict[str, float]]:
    sources = row.get("sources")
    return {name: found for name, found in sources.items() if isinstance(found, dict)} if isinstance(sources, dict) else {}
