"""What evaluations found of committed checkpoints: scores.json inside each, and best.json beside them.

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


def keep_score(path: Path, step: int, validation_set: str, score: Mapping[str, Any]) -> None:
    """Write what an evaluation found into the committed checkpoint at `path`, and mark it if it is the best of its run.

    Without a checkpoint there nothing happens. A disk that does not take it is a warning: metrics.jsonl has the score too.
    """
    try:
        if (path / "manifest.json").is_file():
            others = {name: found for name, found in read_scores(path).items() if name != validation_set}
            write_json(path / SCORES_FILE, {**others, validation_set: dict(score)})
            mark_best(path.parent.parent, step, score["loss"], validation_set)
    except OSError as error:
        log.warning("the score of step %d is not kept: %s", step, error)


def read_scores(path: Path) -> dict[str, Any]:
    """What evaluations of a checkpoint found, by validation set, the last written one last; {} if there was none."""
    file = path / SCORES_FILE
    scores = read_object(file) if file.exists() else {}
    check_fields(file, scores, dict.fromkeys(scores, dict))
    for score in scores.values():
        check_fields(file, score, {"loss": (int, float)})
    return scores


def read_best(run_dir: Path) -> dict[str, Any]:
    """The step, loss and validation set of a run's best checkpoint; {} if none was evaluated. Raises UserError if damaged."""
    path = run_dir / "checkpoints" / "best.json"
    return read_object(path, {"step": int, "validation_loss": (int, float)}) if path.exists() else {}


def validation_loss(path: Path, validation_set: str | None = None) -> float | None:
    """A checkpoint's loss on that validation set (None: on the one evaluated last), or None.

    Release 0.1 kept it in state.json and did not say of which set: it counts for any.
    """
    scores = read_scores(path)
    if validation_set is None and scores:
        return float([*scores.values()][-1]["loss"])
    if validation_set in scores:
        return float(scores[validation_set]["loss"])
    try:
        return read_object(path / "state.json").get("validation_loss")
    except UserError:
        return None


def mark_best(run_dir: Path, step: int, loss: float, validation_set: str | None = None) -> bool:
    """Record a committed step as the best if its loss is lower than the best one's on the same validation set; returns whether
    it is. With another set the comparison begins anew."""
    path = run_dir / "checkpoints" / "best.json"
    if not math.isfinite(loss):
        return False
    best = read_best(run_dir)
    same = best.get("validation_set") in (None, validation_set)  # an old file does not say which
    if best and same and best["validation_loss"] <= loss:
        return False
    of_set = {} if validation_set is None else {"validation_set": validation_set}
    write_json(path, {"step": step, "validation_loss": loss, **of_set})
    return True
