"""Early stopping: a run ends when its validation loss, or a score, has not improved for some evaluations.

Evaluations are read from metrics.jsonl, without those that a rewind or a restart repeated, so a start after a stop continues
the count. With another validation set or other questions the count begins again, because their numbers are not comparable. It
also begins again at a planned change (row `planned`), which may raise the loss by itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megagpt.checkpoint.scores import as_loss, score_of
from megagpt.monitor.metrics import read_metrics


def used_up(losses: Sequence[float], patience: int) -> bool:
    """Whether each of the last `patience` losses is at least the lowest one before them; patience 0 is never used up."""
    if patience == 0 or len(losses) <= patience:
        return False
    return not min(losses[-patience:]) < min(losses[:-patience])


def evaluated_losses(run_dir: Path, metric: str = "loss", measured: str | None = None) -> list[float]:
    """The validation losses of a run, in the order of their steps; a non-finite one counts as infinite. Of another metric,
    "TASK.METRIC", its values, negative where the highest is the best. Raises UserError if a score has no such value.

    `measured` names the validation set or the questions that count (None: any); rows of earlier versions name none, and count.
    """
    metrics = read_metrics(run_dir)
    changed = max((row["step"] for row in metrics.of_kind("planned")), default=-1)
    evaluated = metrics.of_kind("evaluate")
    if metric != "loss":  # a classifier's scores are of its evaluations
        evaluated = [row for row in evaluated if "scores" in row] or metrics.of_kind("score")
    found = [row for row in evaluated if row["step"] > changed]
    rows = [row for row in found if measured is None or row.get("measured", measured) == measured]
    if metric == "loss":
        by_step = {row["step"]: float(row["loss"]) for row in rows}
    else:
        by_step = {row["step"]: as_loss(metric, score_of(row["scores"], metric)) for row in rows}
    return [loss if math.isfinite(loss) else math.inf for _, loss in sorted(by_step.items())]
