"""Tasks of lm-evaluation-harness on a model of ours, without an export: prompts, metrics and rules are the harness's own.

Its adapter (a TemplateLM) deals the requests out to the ranks in groups and remembers their answers (evaluate/answers.py).
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megagpt.config import UserError
from megagpt.distributed.world import World
from megagpt.evaluate.answers import Journal
from megagpt.evaluate.generated_answers import AnswerRequest, generate_answers
from megagpt.evaluate.likelihood import LikelihoodRequest, log_likelihoods, prefix_id, text_scorer
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer

BOOTSTRAP_SAMPLES = 1000
"""For the standard error of metrics that are no mean (perplexity, say); lm-eval draws 100,000."""
GREEDY_SETTINGS = {
    "do_sample": (False,),
    "temperature": (0, 0.0, None),
    "num_beams": (1,),
    "top_p": (1, 1.0, None),
    "top_k": (None,),
}
"""What a task may ask of a generated text; all else is refused."""


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """What the harness found on one task, or over a group of tasks."""

    questions: int | None
    """None of a group."""
    num_fewshot: int | None
    version: Any
    metrics: dict[str, float | None]
    """By lm-eval's names, with the filter where it is not "none": acc, acc_norm, perplexity, exact_match,strict-match."""
    standard_errors: dict[str, float | None]
    documents_sha256: str | None
    """Of the task's settings and questions: scores are comparable if it is the same. None of a group."""


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks of the harness with their data in memory: may be asked again and again."""

    names: tuple[str, ...]
    manager: Any
    found: Any
    """What lm-eval's TaskManager.load gives: "tasks" and "groups" by name."""


def load_tasks(names: Sequence[str], folder: Path | None = None) -> LoadedTasks:
    """Tasks, groups and tags by name, from the YAML files of `folder` first. The working directory is that folder meanwhile.

    Raises UserError on names that are not known and on tasks that cannot be loaded.
    """
    import_harness(offline=folder is not None)
    with _in_folder(folder), _quiet():
        manager = _task_manager(names, folder)
        try:
            return LoadedTasks(tuple(names), manager, manager.load(list(names)))
        except Exception as error:  # each task has its own: a file, a column, a data set that is not here
            raise UserError(f"harness: {' '.join(f'{type(error).__name__}: {error}'.split())}") from None


def ask_tasks(
    lm: Any, loaded: LoadedTasks, world: World, *, num_fewshot: int | None = None, max_questions: int | None = None
) -> dict[str, HarnessTask]:
    """The scores of tasks that are loaded, on every rank. Sets the seeds of torch, numpy and random. Raises UserError on tasks
    that ask for what the model does not do, Stopped after a rank got a stop request."""
    lm_eval = import_harness(offline=False)
    names, manager, tasks = loaded.names, loaded.manager, loaded.found
    with _quiet(), _undescribed(), _asking_between(tasks, world):
        groups = [tasks["groups"][name] for name in names if name in tasks["groups"]]
        inside = {task.task_name for group in groups for task in group.get_all_tasks()}
        wanted = [*groups, *(task for name, task in tasks["tasks"].items() if name not in inside)]
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=wanted,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=max_questions,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    results = None
    if found is not None:  # lm-eval gives it to the first rank of each machine
        digests = documents_sha256(loaded, max_questions)
        results = {
            name: HarnessTask(
                questions=found["n-samples"].get(name, {}).get("effective"),
                num_fewshot=found["n-shot"].get(name),
                version=found["versions"].get(name),
                metrics=_metrics(values, errors=False),
                standard_errors=_metrics(values, errors=True),
                documents_sha256=digests.get(name),
            )
            for name, values in found["results"].items()
        }
    return world.broadcast(results)


def documents_sha256(loaded: LoadedTasks, max_questions: int | None = None) -> dict[str, str]:
    """By task: sha256 of its settings and of the questions that are asked."""
    return {name: _digest(task, max_questions) for name, task in loaded.found["tasks"].items()}


def import_harness(*, offline: bool) -> Any:
    """lm_eval; `offline`: Hugging Face's libraries then do not look for data elsewhere.

    Raises UserError if it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap would fork a process per core, on every rank
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: harness needs megagpt[evaluate]") from None
    return lm_eval


def open_adapter(
    model: Callable[..., Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    world: World,
    journal: Journal | None = None,
    in_step: bool = False,
) -> Any:
    """The model as lm-eval takes one (`lm_eval.api.model.TemplateLM`). Put it into evaluation mode first. `in_step`: see
    generate_answers."""
    import_harness(offline=False)
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    options = {"micro_batch_size": micro_batch_size, "world": world, "journal": journal}

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eot_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_id(tokenizer)

        @property
        def max_length(self) -> int:
            return config.seq_len

        @property
        def max_gen_toks(self) -> int:
            return min(256, config.seq_len // 2)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            begins = tokenizer.bos_id is not None and add_special_tokens is not False
            return [*([prefix_id(tokenizer)] if begins else []), *tokenizer.encode(string)]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return text_scorer(model, config, tokenizer, **options)([request.args for request in requests])

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            ids = [LikelihoodRequest(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            vocabulary = {"eot_id": tokenizer.eot_id, "vocab_size": tokenizer.vocab_size}
            found = log_likelihoods(model, config, ids, **vocabulary, **options)
            return [(likelihood.nats, likelihood.is_greedy) for likelihood in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                parts = [utils.make_disjoint_window(window) for window in rolling]
                windows += [(None, context, continuation) for context, continuation in parts]
                owners += [number] * len(parts)
            nats: list[list[float]] = [[] for _ in requests]
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                nats[owner].append(value)
            return [math.fsum(values) for values in nats]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked = [_answer_request(prompt, settings, self.max_gen_toks) for prompt, settings in (r.args for r in requests)]
            return generate_answers(model, config, tokenizer, asked, in_step=in_step, **options)

    return Adapter()


def _answer_request(prompt: str, settings: dict[str, Any], most: int) -> AnswerRequest:
    """lm-eval's generation_kwargs. Raises UserError on what is not greedy, or not known."""
    settings = dict(settings)
    until = settings.pop("until", None) or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    lengths = [settings.pop(name) for name in names if name in settings]
    for name, value in settings.items():
        if value not in GREEDY_SETTINGS.get(name, ()):
            raise UserError(f"harness: generation_kwargs.{name}={value!r} of a task: answers are greedy")
    return AnswerRequest(prompt, (until,) if isinstance(until, str) else tuple(until), int(lengths[0]) if lengths else most)


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's TaskManager over the folder and, if a name is not in there, its own 14,000 files. Raises UserError."""
    from lm_eval.tasks import TaskManager

    where = Path.cwd() if folder is not None else None  # _in_folder went there
    if where is not None:
        manager = TaskManager(include_path=str(where), include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    manager = TaskManager(include_path=None if where is None else str(where))
    for name in names:
        if name not in manager.task_index:
            places = "lm-eval" if folder is None else f"{folder} or lm-eval"
            raise UserError(f"harness: {name}: no task, group or tag of this name in {places}")
    return manager


def _metrics(values: dict[str, Any], *, errors: bool) -> dict[str, float | None]:
    """lm-eval's "acc,none" and "acc_stderr,none" as acc, in two dicts; what is no number is None."""
    found = {}
    for key, value in values.items():
        name, _, kept = key.partition(",")
        if not kept or name.endswith("_stderr") is not errors:
            continue
        name = name.removesuffix("_stderr")
        number = float(value) if isinstance(value, (int, float)) else math.nan
        found[name if kept == "none" else f"{name},{kept}"] = number if math.isfinite(number) else None
    return found


def _digest(task: Any, max_questions: int | None) -> str:
    """sha256 of a task's settings and of the questions that were asked."""
    digest = hashlib.sha256(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
    for number, document in enumerate(task.eval_docs):
        if max_questions is not None and number >= max_questions:
            break
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _in_folder(folder: Path | None) -> Iterator[None]:
    """Paths of data files in a folder's tasks are relative to it: `datasets` takes them relative to the working directory."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise UserError(f"harness_folder={folder}: no such folder")
    with contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _undescribed() -> Iterator[None]:
    """Without lm-eval's description of machine and repository, which nobody reads here: pip, git and more run for seconds."""
    from lm_eval import evaluator

    before = {name: getattr(evaluator, name) for name in ("add_env_info", "get_git_commit_hash")}
    try:
        for name in before:
            setattr(evaluator, name, lambda *_: None)
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)


@contextlib.contextmanager
def _asking_between(tasks: Any, world: World) -> Iterator[None]:
    """Before the prompts of each task are made, which takes seconds of a large one, the ranks agree that none was told to stop.
    Raises Stopped there."""
    asked = {id(task): task for task in tasks["tasks"].values()}
    asked |= {id(task): task for group in tasks["groups"].values() for task in group.get_all_tasks()}

    def asking(build: Callable[..., None]) -> Callable[..., None]:
        def build_all_requests(*arguments: Any, **options: Any) -> None:
            world.agree()
            world.progress()
            build(*arguments, **options)

        return build_all_requests

    for task in asked.values():
        task.build_all_requests = asking(task.build_all_requests)
    try:
        yield
    finally:
        for task in asked.values():
            del task.build_all_requests


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' notes, which every rank would print; what lm-eval prints goes to stderr."""
    import datasets

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        if shown:
            datasets.utils.enable_progress_bars()
