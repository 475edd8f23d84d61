"""Stages without worker processes: for tests about results, starting workers would take longer than everything else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megagpt.corpus.packing import tokenize_documents as pack
from megagpt.corpus.runner import executors
from megagpt.corpus.runner import run_phase as phases
from megagpt.corpus.runner import run_stage as stage
from megagpt.corpus.runner.executors import Execution

Tasks = Iterable[tuple[Any, Callable[..., Any], tuple[Any, ...]]]


def run_tasks(tasks: Tasks, execution: Execution, consume: Callable[[Any, Any], None], describe: Any = str) -> None:
    """The tasks of one worker in this process; with more workers, as always."""
    if execution.num_workers > 1 or execution.executor != "process":
        executors.run_tasks(tasks, execution, consume, describe)
        return
    for key, function, arguments in tasks:
        consume(key, function(*arguments))


@contextmanager
def inline() -> Iterator[None]:
    """Every stage with one worker runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (stage, phases, pack):
            patch.setattr(module, "run_tasks", run_tasks)
        yield
