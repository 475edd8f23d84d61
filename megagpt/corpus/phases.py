"""A phase: tasks of which each commits one file or folder, spread over workers and parts; what is there is not made again."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from megagpt.corpus.executors import Execution, run_tasks
from megagpt.corpus.progress import Progress

Task: TypeAlias = tuple[Path, Callable[..., Any], tuple[Any, ...]]
"""(the file or folder that a task commits, function, arguments)"""

SMALL_PHASE_BYTES = 16 << 20

log = logging.getLogger(__name__)


def run_phase(label: str, tasks: Sequence[Task], execution: Execution, *, task_bytes: Sequence[int]) -> bool:
    """Run this part's tasks whose result is not there. True if afterwards the results of all parts are.

    A phase of little data runs in this process: starting workers would take longer.
    """
    index, count = execution.part_of
    size_of = dict(zip((path for path, _, _ in tasks), task_bytes, strict=True))
    todo = [task for task in tasks[index::count] if not task[0].exists()]
    for folder in {path.parent for path, _, _ in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(size_of[path] for path, _, _ in todo)
    if todo:
        with Progress(label, total) as progress:
            if total <= SMALL_PHASE_BYTES:
                for path, function, arguments in todo:
                    function(*arguments)
                    progress.add(size_of[path])
            else:
                run_tasks(todo, execution, lambda path, _: progress.add(size_of[path]))
    missing = sum(not path.exists() for path, _, _ in tasks)
    if missing:
        log.info(
            "%s: %d of %d tasks remain for other parts: run all parts again when they are done", label, missing, len(tasks)
        )
    return not missing
