"""The report of a run: one self-contained HTML page made from its run directory and its corpora."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint.save_load import list_checkpoints, step_of
from megagpt.config import Config
from megagpt.evaluate.results import read_results
from megagpt.files import read_json, write_text
from megagpt.monitor.goodput import Ledger, advise_checkpoints, goodput_ledger
from megagpt.monitor.metrics import Metrics, Row, read_metrics
from megagpt.report.charts import Chart, Line, smoothed, to_svg
from megagpt.report.funnel import big, read_funnel, show_funnel
from megagpt.report.page import bars, card, details, escape, page, table, tile
from megagpt.watchdog.stragglers import count_slow


class ReportConfig(Config):
    """Which run is reported on."""

    run_dir: Path
    """The run."""
    corpora: dict[str, Path] | None = None
    """work_dir of each corpus, for the data funnel; null = the folders above the shards that the run's settings name."""
    output: Path | None = None
    """The page; null = run_dir/report.html."""


@dataclass(frozen=True)
class Facts:
    """Everything the page shows, as read."""

    run_dir: Path
    metrics: Metrics
    ledger: Ledger
    starts: list[dict[str, Any]]
    """starts/*.json, oldest first."""
    checkpoints: list[dict[str, Any]]
    """step, bytes, best."""
    evaluations: list[dict[str, Any]]
    """The results of evaluations/*.json, oldest step first."""
    funnels: dict[str, list[dict[str, Any]]]
    """By corpus: the summaries of its stages, and of its shards."""
    settings: str
    """config.yaml."""


def report_run(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises UserError if the run has no metrics."""
    facts = read_facts(config)
    path = config.output or config.run_dir / "report.html"
    write_text(path, render(facts))
    return path


def read_facts(config: ReportConfig) -> Facts:
    """Read a run directory; what a run does not have yet is empty."""
    run_dir = config.run_dir
    metrics = read_metrics(run_dir)
    starts = [read_json(path) for path in sorted((run_dir / "starts").glob("*.json"))]
    corpora = config.corpora
    if corpora is None:
        sources = starts[-1]["config"]["data"]["sources"] if starts else {}
        corpora = {name: Path(source["path"]).parent for name, source in sources.items()}
    settings = run_dir / "config.yaml"
    return Facts(
        run_dir=run_dir,
        metrics=metrics,
        ledger=goodput_ledger(metrics),
        starts=starts,
        checkpoints=_read_checkpoints(run_dir),
        evaluations=[found for path in sorted((run_dir / "evaluations").glob("step_*.json")) for found in read_results(path)],
        funnels={name: funnel for name, work_dir in corpora.items() if (funnel := read_funnel(work_dir))},
        settings=settings.read_text(encoding="utf-8") if settings.exists() else "",
    )


def render(facts: Facts) -> str:
    """The page as HTML."""
    name = facts.run_dir.resolve().name
    body = [
        f'<h1>{escape(name)}</h1><p>{_status(facts)} <span class="muted">{escape(_made_by(facts))}</span></p>',
        f'<div class="tiles">{"".join(_tiles(facts))}</div>',
        '<div class="grid">',
        card("Loss", _loss_chart(facts), wide=True),
        *(card(title, svg) for title, svg in _small_charts(facts)),
        card("Where the time went", _goodput(facts.ledger) + _advice(facts.metrics), wide=True),
        card(
            "From documents to shards", "".join(show_funnel(name, stages) for name, stages in facts.funnels.items()), wide=True
        ),
        card("Evaluations of checkpoints", _evaluations(facts.evaluations), wide=True),
        card("Generated text", _samples(facts.metrics.of_kind("sample")), wide=True),
        card("Starts", _starts(facts), wide=True),
        card("Slow ranks", _slow_ranks(facts.metrics.of_kind("train")), wide=True),
        card("Checkpoints", _checkpoints(facts.checkpoints), wide=True),
        card("Settings and versions", _settings(facts), wide=True),
        "</div>",
    ]
    return page(f"{name} – MegaGPT", "".join(body))


# Head


def _status(facts: Facts) -> str:
    last = facts.metrics.all_rows[-1] if facts.metrics.all_rows else None
    if last is None:
        text = "nothing logged yet"
    elif last["kind"] == "done":
        text = f"finished at step {last['step']:,}"
    elif last["kind"] == "stop":
        text = f"stopped on request at step {last['step']:,} ({last.get('reason', 'no reason given')})"
    elif last["kind"] == "watchdog":
        text = f"ended by the watchdog at step {last['step']:,} ({_hang(last)})"
    else:
        text = f"last word at step {last['step']:,}, {_clock(last['time'])}"
    return f'<span class="status">{escape(text)}</span>'


def _made_by(facts: Facts) -> str:
    if not facts.starts:
        return ""
    start = facts.starts[-1]
    model = start["config"].get("model", {})
    sizes = f"{model.get('num_layers')} layers × {model.get('hidden_size')} wide, context {model.get('seq_len')}"
    return f"{sizes} · {start['world_size']} × {start['device']} · commit {(start['git_commit'] or 'unknown')[:12]}"


def _tiles(facts: Facts) -> list[str]:
    train, evaluated = facts.metrics.of_kind("train"), facts.metrics.of_kind("evaluate")
    tiles = []
    if train:
        tiles.append(tile("training loss", f"{_mean_of_last(train, 'loss'):.4f}", "mean of the last 10 lines"))
    if evaluated:
        best = min(evaluated, key=lambda row: row["loss"])
        bits = f", {best['bits_per_byte']:.3f} bits per byte" if best.get("bits_per_byte") else ""
        tiles.append(tile("best validation loss", f"{best['loss']:.4f}", f"step {best['step']:,}{bits}"))
    if train:
        rates = [row["tokens_per_second"] for row in train if "tokens_per_second" in row]
        tiles.append(tile("tokens", big(train[-1].get("tokens", 0)), f"{train[-1]['step']:,} steps"))
        if rates:
            tiles.append(tile("throughput", f"{big(statistics.median(rates))}/s", "tokens, median"))
        shares = [row["mfu"] for row in train if "mfu" in row]
        if shares:
            causal = statistics.median(row["mfu_causal"] for row in train if "mfu_causal" in row)
            tiles.append(tile("MFU", f"{statistics.median(shares):.1%}", f"full attention; causal {causal:.1%}"))
    if facts.ledger.seconds:
        tiles.append(tile("goodput", f"{facts.ledger.goodput:.0%}", f"of {_span(facts.ledger.wall_seconds)}"))
    count = len({row["incarnation"] for row in facts.metrics.all_rows})
    lost = len(facts.metrics.all_rows) - len(facts.metrics.rows)
    tiles.append(tile("starts", str(count), f"{lost} lines done again" if lost else ""))
    return tiles


# Charts


def _restarts(facts: Facts) -> tuple[float, ...]:
    return tuple(row["step"] for row in facts.metrics.of_kind("start") if row["step"] > 0)


def _loss_chart(facts: Facts) -> str:
    train, evaluated = facts.metrics.of_kind("train"), facts.metrics.of_kind("evaluate")
    lines = []
    if train:
        steps, losses = _column(train, "loss")
        window = min(100.0, max(3.0, len(losses) / 50))
        if len(losses) > 30:
            lines.append(Line("training", steps, losses, 1, faint=True))
            lines.append(Line("training (smoothed)", steps, smoothed(losses, 1 - 1 / window), 1))
        else:
            lines.append(Line("training", steps, losses, 1))
    names = sorted({name for row in evaluated for name in row.get("sources", {})})
    if len(names) != 1 and evaluated:
        lines.append(Line("validation", *_column(evaluated, "loss"), 2, markers=True))
    for number, name in enumerate(names[:4]):
        rows = [{"step": row["step"], **row["sources"][name]} for row in evaluated if name in row.get("sources", {})]
        series = 2 if len(names) == 1 else 3 + number
        lines.append(Line(f"validation: {name}", *_column(rows, "loss"), series, markers=True))
    if not lines:
        return ""
    values = [value for line in lines for value in line.y]
    chart = Chart("Loss", tuple(lines), _restarts(facts), unit="nats per token", size=(11.0, 3.6), y_limits=_limits(values))
    note = '<p class="muted">dashed lines: steps from which a later attempt resumed</p>' if chart.restarts else ""
    rest = f'<p class="muted">not drawn: {", ".join(map(escape, names[4:]))}</p>' if len(names) > 4 else ""
    return to_svg(chart) + note + rest


def _small_charts(facts: Facts) -> list[tuple[str, str]]:
    train = facts.metrics.of_kind("train")
    found = []
    for title, key, unit in (
        ("Learning rate", "lr", ""),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Throughput", "tokens_per_second", "tokens per second"),
    ):
        steps, values = _column(train, key)
        if values:
            lowest = min(values)
            limits = (0.0, 1.08 * max(values)) if lowest >= 0 and max(values) > 0 else None
            chart = Chart(title, (Line(title, steps, values, 1),), _restarts(facts), unit=unit, y_limits=limits)
            found.append((title, to_svg(chart)))
    return found


def _column(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a finite number under `key`."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and abs(row[key]) < float("inf")]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show all but the worst 1 % of the values: the first steps would flatten the rest."""
    ordered = sorted(values)
    top, bottom = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], ordered[0]
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


# Sections


def _goodput(ledger: Ledger) -> str:
    total = ledger.wall_seconds
    rows = sorted(ledger.seconds.items(), key=lambda item: -item[1])
    colours = {"train": 3, "repeated": 2, "hang": 2, "down": 2, "queue": 2, "launch": 2}
    return bars(
        [(name, s / total, f"{_span(s)} · {s / total:.1%}", colours.get(name, 1)) for name, s in rows if total and s > 0]
    )


def _advice(metrics: Metrics) -> str:
    advice = advise_checkpoints(metrics)
    return "" if advice is None else f'<p class="muted">checkpoints: {escape(advice.line())}</p>'


def _evaluations(evaluations: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{found['step']:,}",
            name,
            f"{score['loss']:.4f}",
            f"{score['unigram_entropy']:.4f}",
            f"{score['perplexity']:.4g}",
            None if score["bits_per_byte"] is None else f"{score['bits_per_byte']:.4f}",
            None if score.get("accuracy") is None else f"{score['accuracy']:.4f}",
            f"{score['tokens']:,}",
            _limit(found),
        )
        for found in evaluations
        for name, score in found["sources"].items()
    ]
    tasks = [
        (
            f"{found['step']:,}",
            name,
            f"{task['accuracy']:.3f}" + ("" if task["standard_error"] is None else f" ± {task['standard_error']:.3f}"),
            f"{task['chance']:.3f}",
            _limit(found),
        )
        for found in evaluations
        for name, task in found["tasks"].items()
    ]
    head = ("step", "source", "loss", "unigram entropy", "perplexity", "bits per byte", "token accuracy", "tokens", "samples")
    html = table(head, rows, numbers=(0, 2, 3, 4, 5, 6, 7, 8)) if rows else ""
    head = ("step", "task", "accuracy", "chance", "samples")
    return html + (table(head, tasks, numbers=(0, 2, 3, 4)) if tasks else "")


def _limit(evaluation: dict[str, Any]) -> str:
    """Of how many samples a result is, at most."""
    most = evaluation.get("config", {}).get("max_samples")
    return "all" if most is None else f"≤ {most:,}"


def _samples(rows: list[Row]) -> str:
    def quote(row: Row) -> str:
        prompt = f"<b>{escape(row.get('prompt', ''))}</b>"
        return f"<h3>step {row['step']:,}</h3><blockquote><pre>{prompt}{escape(row['text'])}</pre></blockquote>"

    if len(rows) < 3:
        return "".join(map(quote, rows))
    earlier = f"<details><summary>{len(rows) - 2} between them</summary>{''.join(map(quote, rows[1:-1]))}</details>"
    return quote(rows[-1]) + quote(rows[0]) + earlier


def _starts(facts: Facts) -> str:
    ends = {}
    for row in facts.metrics.all_rows:
        ends[row["incarnation"]] = row
    first = {row["incarnation"]: row for row in facts.metrics.all_rows if row["kind"] == "start"}
    rows = []
    for start in facts.starts:
        number = start["incarnation"]
        began, end = first.get(number), ends.get(number)
        words = {} if end is None else {"done": "done", "stop": f"stop: {end.get('reason')}", "watchdog": _hang(end)}
        how = "–" if end is None else words.get(end["kind"], "no last word")
        rows.append(
            (
                number,
                start["time"],
                start["host"],
                start["launcher"],
                start["world_size"],
                (start["git_commit"] or "unknown")[:12],
                None if began is None else f"{began['step']:,}",
                None if end is None else f"{end['step']:,}",
                how,
            )
        )
    head = ("start", "time", "host", "launcher", "ranks", "commit", "from step", "to step", "end")
    return table(head, rows, numbers=(4, 6, 7)) if rows else ""


def _hang(row: Row) -> str:
    """Who was missing when the watchdog ended a start."""
    who = "no rank" if row.get("rank") is None else f"rank {row['rank']}"
    return f"hang in {row.get('activity')}: {row.get('cause')}, {who}"


def _slow_ranks(train: Sequence[Row]) -> str:
    """The ranks that the log names as slow, the most often named first."""
    told = [row for row in train if "step_time" in row]
    named = count_slow(row.get("slow", "") for row in told)
    rows = [(place, what, f"{times:,} of {len(told):,}", last) for (place, what), (times, last) in named.items()]
    return table(("rank", "slow in", "times named", "last time"), rows[:20], numbers=(2,)) if rows else ""


def _read_checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    best_path = run_dir / "checkpoints" / "best.json"
    best = read_json(best_path) if best_path.exists() else {}
    found = []
    for path in list_checkpoints(run_dir):
        with contextlib.suppress(FileNotFoundError):  # the run continues, and deletes old ones
            sizes = [file.stat().st_size for file in path.iterdir()]
            is_best = f"best: {best['validation_loss']:.4f}" if step_of(path) == best.get("step") else ""
            found.append({"step": step_of(path), "bytes": sum(sizes), "files": len(sizes), "best": is_best})
    return found


def _checkpoints(checkpoints: list[dict[str, Any]]) -> str:
    rows = [(f"{c['step']:,}", f"{c['bytes'] / 1e6:,.1f} MB", c["files"], c["best"]) for c in checkpoints]
    return table(("step", "size", "files", ""), rows, numbers=(0, 1, 2)) if rows else ""


def _settings(facts: Facts) -> str:
    html = details("settings of the last start (config.yaml)", facts.settings) if facts.settings else ""
    if facts.starts:
        start = facts.starts[-1]
        versions = {"python": start["python"], **start["versions"], "data fingerprint": start["data_fingerprint"]}
        html += details("versions", "\n".join(f"{name}: {value}" for name, value in versions.items()))
    return html


def _mean_of_last(rows: Sequence[Row], key: str) -> float:
    values = _column(rows, key)[1][-10:]
    return statistics.fmean(values) if values else float("nan")


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def _clock(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))
