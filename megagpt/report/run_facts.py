"""Read what the report of a run shows from its run directory. A damaged file is left out and named in one line."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megagpt.checkpoint.on_disk import list_checkpoints, step_of
from megagpt.config import UserError
from megagpt.evaluate.results import read_results
from megagpt.files import read_json
from megagpt.monitor.goodput import Ledger, goodput_ledger
from megagpt.monitor.metrics import Metrics, Row, read_metrics
from megagpt.report.consumed import Span, order_of, read_consumed
from megagpt.report.funnel import read_funnel
from megagpt.report.run_state import number

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows."""

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
    """By corpus: the summaries of its stages and of its shards."""
    consumed: list[Span]
    """Samples by source over the updates."""
    settings: str
    """The text of config.yaml."""
    problems: tuple[str, ...]
    """A line for each file that could not be read."""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run_dir.resolve().name


def read_facts(run_dir: Path, corpora: dict[str, Path] | None = None) -> Facts:
    """Read a run directory; parts that do not exist yet are empty. Raises UserError if it has no metrics.

    corpora: work_dir of each corpus; None = the folders above the shards of the last attempt's sources.
    """
    metrics = read_metrics(run_dir)
    problems = [f"metrics.jsonl: {metrics.torn_lines:,} damaged lines left out"] if metrics.torn_lines else []
    starts = [
        start
        for path in sorted((run_dir / "starts").glob("*.json"))
        if (start := _attempt(path, _read_start, problems)) is not None
    ]
    if corpora is None:
        sources = starts[-1]["config"].get("data", {}).get("sources", {}) if starts else {}
        corpora = {name: Path(source["path"]).parent for name, source in sources.items()}
    evaluations = [
        found
        for path in sorted((run_dir / "evaluations").glob("step_*.json"))
        for found in _attempt(path, _read_evaluations, problems) or []
    ]
    funnels = {name: funnel for name, folder in corpora.items() if (funnel := _attempt(folder, read_funnel, problems))}
    orders = {}
    for start in starts:
        record = run_dir / "starts" / f"{start['incarnation']:04d}.json"
        if start["config"].get("data") and (order := _attempt(record, lambda _, start=start: order_of(start), problems)):
            orders[start["incarnation"]] = order
    consumed = _attempt(run_dir / "ledger.jsonl", lambda path: read_consumed(path.parent, orders), problems) or []
    settings = run_dir / "config.yaml"
    return Facts(
        run_dir=run_dir,
        metrics=metrics,
        ledger=goodput_ledger(metrics),
        starts=starts,
        consumed=consumed,
        checkpoints=_read_checkpoints(run_dir, problems),
        evaluations=evaluations,
        funnels=funnels,
        settings=settings.read_text(encoding="utf-8", errors="replace") if settings.exists() else "",
        problems=tuple(problems),
    )


def column(rows: Sequence[Row], key: str) -> tuple[list[Row], list[float]]:
    """(rows that have a finite number under `key`, these numbers)."""
    pairs = [(row, value) for row in rows if (value := number(row.get(key))) is not None]
    return [row for row, _ in pairs], [value for _, value in pairs]


def _attempt(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    """`read(path)`; None, and a line in `problems`, if the file is damaged."""
    try:
        return read(path)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        problems.append(f"{path.parent.name}/{path.name}: damaged, left out ({type(error).__name__}: {reason})")
        return None


def _read_start(path: Path) -> dict[str, Any]:
    start = read_json(path)
    names = ("time", "host", "launcher", "world_size", "device", "git_commit", "git_diff", "python", "data_fingerprint")
    sources = start["config"].get("data", {}).get("sources", {})
    if not all(isinstance(source["path"], str) for source in sources.values()):
        raise ValueError("a source without a path")
    return {**dict.fromkeys(names), "versions": {}, **start, "incarnation": int(start["incarnation"])}


def _read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The results in a file, their figures as numbers. Raises KeyError, TypeError or ValueError if it is damaged."""
    results = read_results(path)
    for result in results:
        result["step"] = int(result["step"])
        result["tasks"] = result.get("tasks", {})
        for score in result["sources"].values():
            for name in ("loss", "unigram_entropy", "perplexity", "tokens"):
                score[name] = float(score[name]) if name != "tokens" else int(score[name])
            score["bits_per_byte"] = number(score.get("bits_per_byte"))
        for task in result["tasks"].values():
            task |= {name: float(task[name]) for name in ("accuracy", "chance")}
            task["standard_error"] = number(task.get("standard_error"))
    return results


def _read_checkpoints(run_dir: Path, problems: list[str]) -> list[dict[str, Any]]:
    best_path = run_dir / "checkpoints" / "best.json"
    best = (_attempt(best_path, read_json, problems) or {}) if best_path.exists() else {}
    value = number(best.get("validation_loss", best.get("value"))) if isinstance(best, dict) else None
    what = f"{best['metric']} " if isinstance(best, dict) and best.get("metric") else ""
    found = []
    for path in list_checkpoints(run_dir):
        with contextlib.suppress(FileNotFoundError):  # the run continues, and deletes old ones
            sizes = [file.stat().st_size for file in path.iterdir()]
            is_best = value is not None and step_of(path) == best.get("step")
            words = f"best: {what}{value:.4f}" if is_best else ""
            found.append({"step": step_of(path), "bytes": sum(sizes), "files": len(sizes), "best": words})
    return found
