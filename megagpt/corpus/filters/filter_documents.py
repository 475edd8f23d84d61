"""The filter stage: run the chosen filters over documents in the order given, with the reasons counted."""

import functools
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.config import Config
from megagpt.corpus.filters.classifier import ClassifierConfig, score_of
from megagpt.corpus.filters.language import LanguageConfig
from megagpt.corpus.filters.registry import FILTERS, FilterConfig, apply_filters, build_filters, rules_passed
from megagpt.corpus.filters.score_quantile import score_of_top, write_scores
from megagpt.corpus.filters.spec import Filter
from megagpt.corpus.runner.blocks import Block, document_blocks, num_bytes, plan_hash, read_block
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.cpu_limit import CpuLimitExceededError, cpu_limit
from megagpt.corpus.runner.run_phase import Task, run_phase
from megagpt.corpus.runner.run_stage import run_stage
from megagpt.corpus.runner.summary import StageSummary
from megagpt.corpus.text.fasttext_models import load_classifier
from megagpt.corpus.text.language_models import warnings
from megagpt.documents import Document, Rejected
from megagpt.files import read_json, sha256_file, write_json
from megagpt.settings_record import MadeWith, fingerprint, first_defaults, hash_of, recorded

FORMAT = 2
"""Of the stage; it grows when the same settings give other results, or files of another form."""

MAX_DOCUMENT_CPU_SECONDS = 20.0
"""CPU time of all filters and cleaners on one document; beyond it the document is rejected as filter:cpu_limit."""

log = logging.getLogger(__name__)


def filter_block(block: Block, *, config: FilterConfig) -> Iterator[Document | Rejected]:
    """The process of the filter stage."""
    filters = build_filters(config)
    for document in read_block(block):
        yield _within_limit(document, filters)


def _within_limit(document: Document, filters: Sequence[Filter]) -> Document | Rejected:
    try:
        with cpu_limit(MAX_DOCUMENT_CPU_SECONDS):
            return apply_filters(document, filters)
    except CpuLimitExceededError:
        return Rejected(document, "filter:cpu_limit")


def filter_documents(
    config: FilterConfig, inputs: Sequence[Path], output_dir: Path, execution: Execution
) -> StageSummary | None:
    """Filter document files into `output_dir`, one output per input, with the reasons in its summary.

    None: other parts have to score their documents first. Raises UserError before any work if a list or a model cannot be read,
    or an input is damaged.
    """
    build_filters(config)
    blocks = document_blocks(inputs)
    classifier = config.section(ClassifierConfig)
    if "classifier" in config.order and classifier.top_fraction is not None:
        min_score = _find_min_score(config, blocks, output_dir, execution)
        if min_score is None:
            return None
        log.info("classifier: the best %g of the documents have a score of at least %g", classifier.top_fraction, min_score)
        config = config.model_copy(update={"classifier": classifier.model_copy(update={"min_score": min_score})})
    labels = config.section(LanguageConfig).labels if "language" in config.order else ()
    for warning in warnings(labels, str(config.section(LanguageConfig).model or "lid.176")) if labels else ():
        log.warning(warning)
    for code in labels:
        names = [name for name in rules_passed(code) if name.partition(".")[0] in config.order]
        if names:
            log.info("language %s passes the rules it has no word lists or no spaces for: %s", code, ", ".join(names))
    process = functools.partial(filter_block, config=config)
    return run_stage("filter", blocks, output_dir, process, made_with=made_with(config), execution=execution)


def _find_min_score(config: FilterConfig, blocks: Sequence[Block], output_dir: Path, execution: Execution) -> float | None:
    """The score of `top_fraction`, from all documents that reach the classifier; None while other parts score theirs."""
    settings = made_with(config).config_hash
    plan = fingerprint(_ScorePlan(blocks=tuple(plan_hash(settings, [block]) for block in blocks)))
    answer, folder = output_dir / "min_score.json", output_dir / f".scores-{plan[:16]}"
    if answer.is_file() and (found := read_json(answer))["plan"] == plan:
        return found["min_score"]
    (output_dir / "summary.json").unlink(missing_ok=True)  # of what there was before: it must not look complete
    paths = [folder / f"{number:06d}.f32" for number in range(len(blocks))]
    tasks: list[Task] = [(path, _score_block, (block, config, path)) for block, path in zip(blocks, paths, strict=True)]
    sizes = [num_bytes(block) for block in blocks]
    if not run_phase("scores", tasks, execution, task_bytes=sizes, counted="documents", small_bytes=1 << 20):
        return None
    try:
        min_score = score_of_top(paths, config.section(ClassifierConfig).top_fraction or 1.0)
    except FileNotFoundError:  # another part was here first, and has removed the scores
        if answer.is_file() and (found := read_json(answer))["plan"] == plan:
            return found["min_score"]
        raise
    write_json(answer, {"plan": plan, "min_score": min_score})
    for stale in output_dir.glob(".scores-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return min_score


class _ScorePlan(Config):
    blocks: tuple[str, ...]


def _score_block(block: Block, config: FilterConfig, path: Path) -> int:
    """Write the scores of a block's documents that reach the classifier; returns how many."""
    first = config.model_copy(update={"order": config.order[: config.order.index("classifier")]})
    filters = build_filters(first)
    classifier = config.section(ClassifierConfig)
    score = load_classifier(classifier.model or Path(), classifier.label)
    outcomes = (_within_limit(document, filters) for document in read_block(block))
    return write_scores((score_of(outcome, score) for outcome in outcomes if isinstance(outcome, Document)), path)


def describe(summary: StageSummary | None, output_dir: Path) -> str:
    """Counts of the filters, for the console: one line per reason, the most frequent first."""
    if summary is None:
        return f"{output_dir}: the documents of this part are scored; run all parts again when they are done"
    if not summary.complete:
        return f"{output_dir}: {summary.files} of {summary.files_total} files are done; the other parts remain"
    lines = [
        f"{output_dir}: kept {summary.kept:,} of {summary.documents_in:,} documents ({summary.characters_out:,} characters)"
    ]
    ranked = sorted(summary.rejected.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(lines + [f"  {count:>10,}  {reason}" for reason, count in ranked])


def made_with(config: FilterConfig) -> MadeWith:
    """The settings that decide the result: those of the filters that run, and the files that they name."""
    unused = {name: type(getattr(config, name))() for name in FILTERS if name not in config.order}
    used = config.model_copy(update={**unused, "inputs": ()})
    # An unused section counts as it did in the first release, whatever its fields and defaults are today.
    first = {name: first_defaults(type(section)) for name, section in unused.items()}
    settings = {name: first.get(name, value) for name, value in recorded(used).items() if first.get(name, True)}
    contents = {str(path): sha256_file(path) for path in sorted(_files(used.model_dump()))}
    config_hash = fingerprint(_Settings(settings=hash_of(settings), files=tuple(contents.values())))
    return MadeWith(config_hash, "filter", used, contents, FORMAT)


class _Settings(Config):
    settings: str
    files: tuple[str, ...]
    """sha256 of the lists and models that the settings name: another list at the same place is another setting."""


def _files(value: Any) -> set[Path]:
    if isinstance(value, Path):
        return {value}
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {path for item in values for path in _files(item)}
