"""The report of a run, or a comparison of several: one self-contained HTML page made from run directories."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from megagpt.config import Config, UserError
from megagpt.files import write_text
from megagpt.monitor.goodput import Ledger, advise_checkpoints
from megagpt.monitor.metrics import Row
from megagpt.report.funnel import big, show_funnel
from megagpt.report.page import Bars, Block, Card, Code, Fold, Heading, Note, Pair, Quote, Table, Tile, page
from megagpt.report.run_charts import (
    MAX_COMPARED,
    compared_cards,
    exports_card,
    loss_card,
    mixture_card,
    score_cards,
    small_cards,
    source_losses_card,
)
from megagpt.report.run_facts import Facts, column, read_facts
from megagpt.report.run_state import number
from megagpt.watchdog.stragglers import count_slow


class ReportConfig(Config):
    """Which run to report on, or which runs to compare. Give run_dir or runs."""

    run_dir: Path | None = None
    """The run to report on."""
    runs: tuple[Path, ...] = ()
    """Runs to compare on one page: curves over steps, tokens and time, and the settings that differ."""
    corpora: dict[str, Path] | None = None
    """work_dir of each corpus, for the data funnel; null = the folders above the shards that the run's settings name."""
    output: Path | None = None
    """The page; null = run_dir/report.html, or comparison.html beside the first of `runs`."""

    @model_validator(mode="after")
    def _check(self) -> "ReportConfig":
        if (self.run_dir is None) == (not self.runs):
            raise ValueError("give one of run_dir and runs: run_dir=runs/first, or runs='[runs/first, runs/second]'")
        if self.runs and not 2 <= len(self.runs) <= MAX_COMPARED:
            raise ValueError(f"runs: give 2 to {MAX_COMPARED} runs, not {len(self.runs)}")
        return self


def report_run(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises UserError if a run has no metrics, or `runs` names one twice."""
    if config.run_dir is not None:
        path = config.output or config.run_dir / "report.html"
        write_text(path, render(read_facts(config.run_dir, config.corpora)))
        return path
    folders = [folder.resolve() for folder in config.runs]
    if len(set(folders)) < len(folders):
        raise UserError(f"runs={[str(run) for run in config.runs]}: names a run twice")
    path = config.output or folders[0].parent / "comparison.html"
    write_text(path, compare([read_facts(folder, {}) for folder in config.runs]))
    return path


def render(facts: Facts) -> str:
    """The page of one run as HTML."""
    funnels = [block for name, stages in facts.funnels.items() for block in show_funnel(name, stages)]
    cards = [
        loss_card(facts),
        source_losses_card(facts),
        *score_cards(facts),
        *small_cards(facts),
        Card("Where the time went", _goodput(facts.ledger) + _advice(facts)),
        mixture_card(facts),
        exports_card(facts),
        Card("From documents to shards", funnels),
        Card("Evaluations of checkpoints", _evaluations(facts.evaluations)),
        Card("Generated text", _samples(facts.metrics.of_kind("sample"))),
        Card("Attempts", _starts(facts)),
        Card("Slow ranks", _slow_ranks(facts.metrics.of_kind("train"))),
        Card("Checkpoints", _checkpoints(facts.checkpoints)),
        Card("Settings and versions", _settings(facts)),
    ]
    name = facts.name
    return page(
        f"{name} – MegaGPT",
        cards,
        heading=name,
        status=_status(facts),
        note=_made_by(facts),
        tiles=_tiles(facts),
        problems=facts.problems,
    )


def compare(runs: Sequence[Facts]) -> str:
    """The page that compares runs as HTML."""
    names = distinct_names([facts.run_dir.resolve() for facts in runs])
    problems = [f"{name}: {problem}" for facts, name in zip(runs, names, strict=True) for problem in facts.problems]
    cards = [
        Card("Figures", [_figures(runs, names)]),
        *compared_cards(runs, names),
        Card("Generated text for the same prompts", _same_prompts(runs, names)),
        Card("Settings that differ", _differences(runs, names)),
    ]
    heading = " · ".join(names)
    return page(f"{heading} – MegaGPT", cards, heading=heading, problems=problems)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each folder, as many as are needed to tell the folders apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


# Comparison


def _figures(runs: Sequence[Facts], names: Sequence[str]) -> Table:
    rows = []
    for facts, name in zip(runs, names, strict=True):
        train = facts.metrics.of_kind("train")
        steps, losses = column(facts.metrics.of_kind("evaluate"), "loss")
        best = min(range(len(losses)), key=losses.__getitem__, default=None)
        counts = column(train, "tokens")[1]
        rates, shares = column(train, "tokens_per_second")[1], column(train, "mfu")[1]
        rows.append(
            (
                name,
                _status(facts),
                big(counts[-1]) if counts else None,
                f"{_mean_of_last(train, 'loss'):.4f}" if column(train, "loss")[1] else None,
                None if best is None else f"{losses[best]:.4f} at step {steps[best]['step']:,}",
                f"{big(statistics.median(rates))}/s" if rates else None,
                f"{statistics.median(shares):.1%}" if shares else None,
                f"{facts.ledger.goodput:.0%} of {_span(facts.ledger.wall_seconds)}" if facts.ledger.seconds else None,
            )
        )
    head = ("run", "state", "tokens", "training loss", "best validation loss", "throughput", "MFU", "goodput")
    return Table(head, rows, numbers=(2, 3, 5, 6))


def _differences(runs: Sequence[Facts], names: Sequence[str]) -> list[Block]:
    settings = [flattened(facts.starts[-1]["config"]) if facts.starts else {} for facts in runs]
    fields = sorted({field for found in settings for field in found} - {"run_dir"})
    rows = [
        (field, *(found.get(field, "–") for found in settings))
        for field in fields
        if len({found.get(field) for found in settings}) > 1
    ]
    unknown = [name for name, found in zip(names, settings, strict=True) if not found]
    blocks: list[Block] = [Note(f"no settings found for {', '.join(unknown)}")] if unknown else []
    return [*blocks, Table(("setting", *names), rows) if rows else Note("no differences")]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as section.field -> value."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "null" if value is None else str(value)
    return found


# Head


def _status(facts: Facts) -> str:
    last = facts.metrics.all_rows[-1] if facts.metrics.all_rows else None
    if last is None:
        return "nothing logged yet"
    if last["kind"] == "done":
        return f"finished at step {last['step']:,}"
    if last["kind"] == "stop":
        return f"stopped on request at step {last['step']:,} ({last.get('reason', 'no reason given')})"
    if last["kind"] == "watchdog":
        return f"ended by the watchdog at step {last['step']:,} ({_hang(last)})"
    return f"last logged at step {last['step']:,}, {_clock(last['time'])}"


def _made_by(facts: Facts) -> str:
    if not facts.starts:
        return ""
    start = facts.starts[-1]
    model = start["config"].get("model", {})
    sizes = f"{model.get('num_layers')} layers × {model.get('hidden_size')} wide, context {model.get('seq_len')}"
    return f"{sizes} · {start['world_size']} × {start['device']} · commit {_commit(start)}"


def _tiles(facts: Facts) -> list[Tile]:
    train = facts.metrics.of_kind("train")
    evaluated, validation = column(facts.metrics.of_kind("evaluate"), "loss")
    tiles = []
    if column(train, "loss")[1]:
        tiles.append(Tile("training loss", f"{_mean_of_last(train, 'loss'):.4f}", "mean of the last 10 lines"))
    if validation:
        best = min(range(len(validation)), key=validation.__getitem__)
        per_byte = number(evaluated[best].get("bits_per_byte"))
        bits = f", {per_byte:.3f} bits per byte" if per_byte else ""
        tiles.append(Tile("best validation loss", f"{validation[best]:.4f}", f"step {evaluated[best]['step']:,}{bits}"))
    counts, rates = column(train, "tokens")[1], column(train, "tokens_per_second")[1]
    if counts:
        tiles.append(Tile("tokens", big(counts[-1]), f"{train[-1]['step']:,} steps"))
    if rates:
        tiles.append(Tile("throughput", f"{big(statistics.median(rates))}/s", "tokens, median"))
    shares, causal = column(train, "mfu")[1], column(train, "mfu_causal")[1]
    if shares:
        note = f"full attention; causal {statistics.median(causal):.1%}" if causal else "full attention"
        tiles.append(Tile("MFU", f"{statistics.median(shares):.1%}", note))
    if facts.ledger.seconds:
        tiles.append(Tile("goodput", f"{facts.ledger.goodput:.0%}", f"of {_span(facts.ledger.wall_seconds)}"))
    count = len({row["incarnation"] for row in facts.metrics.all_rows})
    lost = len(facts.metrics.all_rows) - len(facts.metrics.rows)
    return [*tiles, Tile("attempts", str(count), f"{lost} rows superseded" if lost else "")]


# Sections


def _goodput(ledger: Ledger) -> list[Block]:
    total = ledger.wall_seconds
    colours = {"train": 3, "repeated": 2, "hang": 2, "down": 2, "queue": 2, "launch": 2}
    rows = [
        (name, seconds / total, f"{_span(seconds)} · {seconds / total:.1%}", colours.get(name, 1))
        for name, seconds in sorted(ledger.seconds.items(), key=lambda item: -item[1])
        if total and seconds > 0
    ]
    return [Bars(rows)] if rows else []


def _advice(facts: Facts) -> list[Block]:
    advice = advise_checkpoints(facts.metrics)
    return [] if advice is None else [Note(f"checkpoints: {advice.line()}")]


def _evaluations(evaluations: list[dict[str, Any]]) -> list[Block]:
    rows = [
        (
            f"{found['step']:,}",
            name,
            f"{score['loss']:.4f}",
            f"{score['unigram_entropy']:.4f}",
            f"{score['perplexity']:.4g}",
            None if score["bits_per_byte"] is None else f"{score['bits_per_byte']:.4f}",
            None if (accuracy := number(score.get("accuracy"))) is None else f"{accuracy:.4f}",
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
    blocks: list[Block] = []
    if rows:
        head = (
            "step",
            "source",
            "loss",
            "unigram entropy",
            "perplexity",
            "bits per byte",
            "token accuracy",
            "tokens",
            "samples",
        )
        blocks.append(Table(head, rows, numbers=(0, 2, 3, 4, 5, 6, 7, 8)))
    if tasks:
        blocks.append(Table(("step", "task", "accuracy", "chance", "samples"), tasks, numbers=(0, 2, 3, 4)))
    return blocks


def _limit(evaluation: dict[str, Any]) -> str:
    """The largest number of samples behind a result."""
    most = evaluation.get("config", {}).get("max_samples")
    return "all" if most is None else f"≤ {most:,}"


def _samples(rows: list[Row]) -> list[Block]:
    def quote(row: Row) -> list[Block]:
        text = Quote([(str(row.get("text", "")), False)], lead=str(row.get("prompt", "")))
        return [Heading(f"step {row['step']:,}"), text]

    if len(rows) < 3:
        return [block for row in rows for block in quote(row)]
    between = [block for row in rows[1:-1] for block in quote(row)]
    return [*quote(rows[-1]), *quote(rows[0]), Fold(f"{len(rows) - 2} samples in between", between)]


def _same_prompts(runs: Sequence[Facts], names: Sequence[str]) -> list[Block]:
    """The newest text of each run for every prompt that at least two runs were given."""
    latest = [{str(row.get("prompt", "")): row for row in facts.metrics.of_kind("sample")} for facts in runs]
    shared = {prompt for i, found in enumerate(latest) for prompt in found if any(prompt in other for other in latest[:i])}
    blocks: list[Block] = []
    for prompt in sorted(shared):
        texts = [
            (f"{name}, step {found[prompt]['step']:,}", Quote([(str(found[prompt].get("text", "")), False)], lead=prompt))
            for name, found in zip(names, latest, strict=True)
            if prompt in found
        ]
        for (left, ours), (right, theirs) in zip(texts[::2], texts[1::2], strict=False):
            blocks.append(Pair((left, right), [ours], [theirs]))
        if len(texts) % 2:
            blocks += [Heading(texts[-1][0]), texts[-1][1]]
    return blocks


def _commit(start: dict[str, Any]) -> str:
    """The commit's first 12 digits, and the file with the changes of the code that ran, if it had any."""
    commit = str(start["git_commit"] or "unknown")
    changes = f" + starts/{start['git_diff']}" if start["git_diff"] else " + changes" * commit.endswith("+changes")
    return commit.removesuffix("+changes")[:12] + changes


def _starts(facts: Facts) -> list[Block]:
    ends = {}
    for row in facts.metrics.all_rows:
        ends[row["incarnation"]] = row
    first = {row["incarnation"]: row for row in facts.metrics.all_rows if row["kind"] == "start"}
    rows = []
    for start in facts.starts:
        attempt = start["incarnation"]
        began, end = first.get(attempt), ends.get(attempt)
        words = {} if end is None else {"done": "done", "stop": f"stop: {end.get('reason')}", "watchdog": _hang(end)}
        how = "–" if end is None else words.get(end["kind"], "no final record")
        rows.append(
            (
                attempt,
                start["time"],
                start["host"],
                start["launcher"],
                start["world_size"],
                _commit(start),
                None if began is None else f"{began['step']:,}",
                None if end is None else f"{end['step']:,}",
                how,
            )
        )
    head = ("attempt", "time", "host", "launcher", "ranks", "commit", "from step", "to step", "end")
    return [Table(head, rows, numbers=(4, 6, 7))] if rows else []


def _hang(row: Row) -> str:
    """Which rank was missing when the watchdog ended an attempt."""
    who = "no rank" if row.get("rank") is None else f"rank {row['rank']}"
    return f"hang in {row.get('activity')}: {row.get('cause')}, {who}"


def _slow_ranks(train: Sequence[Row]) -> list[Block]:
    """The ranks that the log names as slow, most often named first."""
    compared = [row for row in train if "step_time" in row]
    named = count_slow(str(row.get("slow", "")) for row in compared)
    rows = [(place, what, f"{times:,} of {len(compared):,}", last) for (place, what), (times, last) in named.items()]
    return [Table(("rank", "slow in", "times named", "last time"), rows[:20], numbers=(2,))] if rows else []


def _checkpoints(checkpoints: list[dict[str, Any]]) -> list[Block]:
    rows = [(f"{c['step']:,}", f"{c['bytes'] / 1e6:,.1f} MB", c["files"], c["best"]) for c in checkpoints]
    return [Table(("step", "size", "files", ""), rows, numbers=(0, 1, 2))] if rows else []


def _settings(facts: Facts) -> list[Block]:
    blocks: list[Block] = []
    if facts.settings:
        blocks.append(Fold("settings of the last attempt (config.yaml)", [Code(facts.settings)]))
    if facts.starts:
        start = facts.starts[-1]
        versions = {"python": start["python"], **start["versions"], "data fingerprint": start["data_fingerprint"]}
        blocks.append(Fold("versions", [Code("\n".join(f"{name}: {value}" for name, value in versions.items()))]))
    return blocks


def _mean_of_last(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(column(rows, key)[1][-10:])


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def _clock(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))
