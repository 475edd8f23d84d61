"""A phase: tasks that each commit one file or folder, spread over workers and parts; committed ones are skipped."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.executors import run_tasks
from megagpt.corpus.runner.progress import Progress

Task: TypeAlias = tuple[Path, Callable[..., Any], tuple[Any, ...]]
"""(the file or folder that a task commits, function, arguments)"""

SMALL_PHASE_BYTES = 16 << 20

log = logging.getLogger(__name__)


def run_phase(
    label: str,
    tasks: Sequence[Task],
    execution: Execution,
    *,
    task_bytes: Sequence[int],
    counted: str | None = None,
    small_bytes: int = SMALL_PHASE_BYTES,
    describe: Callable[[Path], str] = str,
) -> bool:
    """Run this part's tasks that have no result yet. True if the results of all parts exist afterwards.

    A phase of at most `small_bytes` runs in this process: starting workers would take longer. `counted` names what functions
    return the number of, for the progress line; `describe` says what a task was at work on if its worker dies.
    """
    index, count = execution.part_of
    size_of = dict(zip((path for path, _, _ in tasks), task_bytes, strict=True))
    todo = [task for task in tasks[index::count] if not task[0].exists()]
    for folder in {path.parent for path, _, _ in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(size_of[path] for path, _, _ in todo)
    if todo:
        with Progress(label, total, skipped=len(tasks[index::count]) - len(todo)) as progress:

            def consume(path: Path, result: Any) -> None:
                progress.add(size_of[path], **({counted: result} if counted else {}))

            if total <= small_bytes:
                for path, function, arguments in todo:
                    consume(path, function(*arguments))
            else:
                run_tasks(todo, execution, consume, describe)
    missing = sum(not path.exists() for path, _, _ in tasks)
    if missing:
        log.info(
            "%s: %d of %d tasks remain for other parts: run all parts again when they are done", label, missing, len(tasks)
        )
    return not missing
