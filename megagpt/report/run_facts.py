"""What the report of a run shows, read from its run directory; a file that is damaged is named in one line and left out."""

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
from megagpt.report.consumed import Span, read_consumed
from megagpt.report.funnel import read_funnel
from megagpt.report.run_state import number

T = TypeVar("T")


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
    consumed: list[Span]
    """Samples by source over the updates."""
    settings: str
    """config.yaml."""
    problems: tuple[str, ...]
    """What could not be read, a line each."""

    @property
    def name(self) -> str:
        """The run's folder."""
        return self.run_dir.resolve().name


def read_facts(run_dir: Path, corpora: dict[str, Path] | None = None) -> Facts:
    """Read a run directory; what a run does not have yet is empty. Raises UserError if it has no metrics."""
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
    consumed = _attempt(run_dir / "ledger.jsonl", lambda path: read_consumed(path.parent, starts), problems) or []
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
    """The rows that have a finite number under `key`, and the numbers."""
    pairs = [(row, value) for row in rows if (value := number(row.get(key))) is not None]
    return [row for row, _ in pairs], [value for _, value in pairs]


def _attempt(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    """`read(path)`, or None and a line in `problems` where the file is not what it should be."""
    try:
        return read(path)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        problems.append(f"{path.parent.name}/{path.name}: damaged, and left out ({type(error).__name__}: {reason})")
        return None


def _read_start(path: Path) -> dict[str, Any]:
    start = read_json(path)
    names = ("time", "host", "launcher", "world_size", "device", "git_commit", "git_diff", "python", "data_fingerprint")
    sources = start["config"].get("data", {}).get("sources", {})
    if not all(isinstance(source["path"], str) for source in sources.values()):
        raise ValueError("a source without a path")
    return {**dict.fromkeys(names), "versions": {}, **start, "incarnation": int(start["incarnation"])}


def _read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Results whose figures are numbers."""
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
