"""The summary of a stage, and its output files, for the stages and tools after it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.output_list import check_outputs


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Counts of a stage, summed over its finished files. documents_in = kept + rejected."""

    stage: str
    config_hash: str
    files: int = 0
    files_total: int = 0
    complete: bool = False
    documents_in: int = 0
    kept: int = 0
    characters_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    fault_examples: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    dropped_templates: dict[str, int] = field(default_factory=dict)
    """Templates of a wiki that left a hole in a sentence, with how many; the most frequent MAX_TEMPLATE_NAMES of them."""
    outputs: dict[str, Any] | None = None
    """Size and sha256 of outputs.json; None: unfinished, or made by an earlier release."""


def read_summary(output_dir: Path) -> StageSummary:
    """The summary of a stage's output. Raises UserError if there is none."""
    return StageSummary(**read_json(output_dir / "summary.json"))


def stage_outputs(output_dir: Path, *, verify: bool = False) -> list[Path]:
    """The document files of a complete stage, sorted.

    Raises UserError if the stage has not run, or not to its end, or if a file is missing or has another size (with `verify`:
    another sha256) than was written.
    """
    if not (output_dir / "summary.json").is_file():
        raise UserError(f"{output_dir}: no finished stage here (summary.json is missing): run the stage that writes it first")
    summary = read_summary(output_dir)
    if not summary.complete:
        raise UserError(
            f"{output_dir}: {summary.stage} has finished {summary.files} of {summary.files_total} files: "
            "run the same command again (or the other parts) first"
        )
    return [path.with_name(path.name.removesuffix(".done.json")) for path in check_outputs(output_dir, verify=verify)]
