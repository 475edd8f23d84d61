"""Early stopping: a run ends when its validation loss has not fallen for some evaluations.

What was evaluated is read from metrics.jsonl, without what a rewind or a restart did again: so a start after a stop counts on.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megagpt.monitor.metrics import read_metrics


def used_up(losses: Sequence[float], patience: int) -> bool:
    """Whether each of the last `patience` losses is at least the lowest one before them; patience 0 is never used up."""
    if patience == 0 or len(losses) <= patience:
        return False
    return not min(losses[-patience:]) < min(losses[:-patience])


def evaluated_losses(run_dir: Path) -> list[float]:
    """The validation losses of a run, in the order of their steps; a non-finite one counts as infinite."""
    by_step = {row["step"]: float(row["loss"]) for row in read_metrics(run_dir).of_kind("evaluate")}
    return [loss if math.isfinite(loss) else math.inf for _, loss in sorted(by_step.items())]
