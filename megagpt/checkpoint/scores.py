"""Scores of committed checkpoints: scores.json inside each, and best.json beside them.

A checkpoint is committed before it is evaluated, so its score is no part of it: scores.json is not in the manifest, moves with
the folder and goes with it. Scores are kept by validation set: losses on different ones are never compared.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import check_fields, read_object, write_json

log = logging.getLogger(__name__)

SCORES_FILE = "scores.json"


LOWER_IS_BETTER = ("loss", "loss_of_gold", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")
"""Metrics whose lowest value is the best; of every other metric it is the highest."""


def keep_score(path: Path, step: int, validation_set: str, score: Mapping[str, Any], *, best_by: str | None = "loss") -> None:
    """Write the scores of an evaluation into the committed checkpoint at `path`, and mark it if it is the best of its run by
    `best_by`: "loss", "TASK.METRIC" of the score's `scores`, or None = by what others evaluate.

    Without a checkpoint there it does nothing. A failed write is a warning only: metrics.jsonl has the score too.
    """
    try:
        if (path / "manifest.json").is_file():
            others = {name: found for name, found in read_scores(path).items() if name != validation_set}
            write_json(path / SCORES_FILE, {**others, validation_set: dict(score)})
            if best_by == "loss":
                mark_best(path.parent.parent, step, score["loss"], validation_set)
            elif best_by is not None:
                mark_best(path.parent.parent, step, score_of(score["scores"], best_by), validation_set, metric=best_by)
    except OSError as error:
        log.warning("the score of step %d is not kept: %s", step, error)


def read_scores(path: Path) -> dict[str, Any]:
    """The scores of a checkpoint by validation set, the newest last; {} if there are none."""
    file = path / SCORES_FILE
    scores = read_object(file) if file.exists() else {}
    check_fields(file, scores, dict.fromkeys(scores, dict))
    for score in scores.values():
        check_fields(file, score, dict.fromkeys(score.keys() & {"loss"}, (int, float)))
    return scores


def read_best(run_dir: Path) -> dict[str, Any]:
    """The contents of best.json about a run's best checkpoint; {} if none was evaluated. Raises UserError if it is damaged."""
    path = run_dir / "checkpoints" / "best.json"
    if not path.exists():
        return {}
    best = read_object(path, {"step": int})
    check_fields(path, best, {"validation_loss" if best.get("metric") is None else "value": (int, float)})
    return best


def validation_loss(path: Path, validation_set: str | None = None) -> float | None:
    """A checkpoint's loss on that validation set (None: on the one evaluated last), or None.

    Release 0.1 kept it in state.json and did not say of which set: it counts for any.
    """
    scores = {name: found for name, found in read_scores(path).items() if "loss" in found}
    if validation_set is None and scores:
        return float([*scores.values()][-1]["loss"])
    if validation_set in scores:
        return float(scores[validation_set]["loss"])
    try:
        return read_object(path / "state.json").get("validation_loss")
    except UserError:
        return None


def value_of(path: Path, measured: str | None, metric: str | None) -> float | None:
    """What best.json compares of a checkpoint: its validation loss (`metric` None), or "TASK.METRIC"; None if it was not
    found."""
    if metric is None:
        return validation_loss(path, measured)
    found = read_scores(path).get(measured or "", {}).get("scores", {})
    try:
        return score_of(found, metric)
    except UserError:
        return None


def score_of(scores: Mapping[str, Mapping[str, Any]], metric: str) -> float:
    """The value of "TASK.METRIC". Raises UserError if the scores have no number of that name."""
    task, _, name = metric.rpartition(".")
    value = scores.get(task, {}).get(name)
    if value is None:
        known = [f"{task}.{name}" for task, found in scores.items() for name, value in found.items() if value is not None]
        raise UserError(f"best_by={metric}: not among the scores, which are {', '.join(known)}")
    return float(value)


def as_loss(metric: str, value: float) -> float:
    """The value, negated if the highest is the best, so that of two values the lower one is the better one."""
    return value if metric.rpartition(".")[2] in LOWER_IS_BETTER else -value


def mark_best(run_dir: Path, step: int, value: float, validation_set: str | None = None, *, metric: str | None = None) -> bool:
    """Record a committed step as the best if its validation loss (or `metric`, see LOWER_IS_BETTER) is better than the best
    one's on the same validation set or tasks; returns whether it is. On other sets or tasks the comparison begins again."""
    path = run_dir / "checkpoints" / "best.json"
    if not math.isfinite(value):
        return False
    best = read_best(run_dir)
    same = best.get("validation_set") in (None, validation_set) and best.get("metric") == metric  # an old file has no set
    key = "validation_loss" if metric is None else "value"
    if best and same and as_loss(metric or "loss", best[key]) <= as_loss(metric or "loss", value):
        return False
    of_set = {} if validation_set is None else {"validation_set": validation_set}
    write_json(path, {"step": step, key: value, **of_set, **({} if metric is None else {"metric": metric})})
    return True
