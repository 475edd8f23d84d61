"""The list of a stage's outputs: names, sizes and sha256, written last, its own sum in summary.json.

    output_dir/outputs.json     {"format": 1, "outputs": {name below output_dir: {"bytes": n, "sha256": hex or null}}}
    output_dir/summary.json     "outputs": {"bytes": n, "sha256": hex} of outputs.json

A stage of documents lists the `<name>.done.json`, each of which lists the three files of its input: an output of 100,000 files
has a list of 100,000 lines, and a record that was changed is seen as well as a file that was. sha256 is null for large arrays,
of which only the size is compared. An output of release 0.1 has no list: it is read, and named as unverified.
"""

import json
import logging
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json, sha256_file, write_json

LIST_FILE, SUMMARY_FILE, DONE = "outputs.json", "summary.json", ".done.json"
FORMAT = 1
TOOLS = {
    "extract": "extract_documents.py",
    "filter": "filter_documents.py",
    "dedup": "dedup_documents.py",
    "shards": "tokenize_documents.py",
}
"""What makes a stage's output again."""

log = logging.getLogger(__name__)


def describe_file(path: Path, *, summed: bool = True) -> dict[str, Any]:
    """Size and sha256 (None unless `summed`) of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path) if summed else None}


def write_list(output_dir: Path, outputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write outputs.json; returns what summary.json says of it."""
    write_json(output_dir / LIST_FILE, {"format": FORMAT, "outputs": dict(sorted(outputs.items()))})
    return describe_file(output_dir / LIST_FILE)


def forget_list(output_dir: Path) -> None:
    """The output is no longer finished: remove its summary, then its list."""
    (output_dir / SUMMARY_FILE).unlink(missing_ok=True)
    (output_dir / LIST_FILE).unlink(missing_ok=True)


def read_list(output_dir: Path) -> dict[str, dict[str, Any]] | None:
    """name -> size and sha256; None for an output that has no list. Raises UserError if it is not the list that was written."""
    summed = read_json(output_dir / SUMMARY_FILE).get("outputs")
    if summed is None:
        return None
    path = output_dir / LIST_FILE
    problem = problem_of(path, summed, verify=True)
    if problem:
        raise UserError(f"{problem}: {_what_to_run(output_dir)}")
    found = read_json(path)
    if found["format"] > FORMAT:
        raise UserError(f"{path}: format {found['format']} is of a later release; this one reads up to {FORMAT}")
    return found["outputs"]


def list_or_none(output_dir: Path) -> dict[str, dict[str, Any]] | None:
    """The list of outputs, None if there is none or it is damaged: then the records of the files are all that is known."""
    if not (output_dir / SUMMARY_FILE).is_file():
        return None
    try:
        return read_list(output_dir)
    except UserError as error:
        log.warning("%s", error)
        forget_list(output_dir)
        return None


def problem_of(path: Path, expected: dict[str, Any], *, verify: bool) -> str:
    """What is wrong with one file; "" if nothing. With `verify` its sha256 is compared, else its size alone."""
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path}: {size} bytes, {expected['bytes']} were written"
    if verify and expected["sha256"] is not None and sha256_file(path) != expected["sha256"]:
        return f"{path}: its sha256 is not the one that was written: it was changed or damaged"
    return ""


def problems_of_file(done: Path, listed: dict[str, dict[str, Any]] | None, *, verify: bool) -> str:
    """What is wrong with a `<name>.done.json` and the files that it lists, as far as that can be told; "" if nothing.

    The record itself is small, so its sum is always compared.
    """
    problem = problem_of(done, listed[done.name], verify=True) if listed and done.name in listed else ""
    if problem:
        return problem
    try:
        files = json.loads(done.read_text(encoding="utf-8"))["files"]
        found = (problem_of(done.parent / name, entry, verify=verify) for name, entry in files.items())
        return next((text for text in found if text), "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{done}: not a record of a finished file ({error})"


def check_outputs(output_dir: Path, *, verify: bool = False) -> list[Path]:
    """The `<name>.done.json` of a finished stage, sorted, after everything that is listed was compared.

    Raises UserError that names what is missing or differs, and which tool makes it again.
    """
    listed = read_list(output_dir)
    found = sorted(output_dir.glob(f"*{DONE}"))
    if listed is None:
        log.warning("%s: an earlier release made it and kept no list of its outputs: unverified, but for sizes", output_dir)
        expected = read_json(output_dir / SUMMARY_FILE)["files"]
        problems = [f"{output_dir}: {len(found)} of {expected} files have their {DONE}"] if len(found) != expected else []
    else:
        extra = {name: entry for name, entry in listed.items() if not name.endswith(DONE)}
        problems = [problem_of(output_dir / name, entry, verify=verify) for name, entry in extra.items()]
        found = sorted(output_dir / name for name in listed if name.endswith(DONE))
    problems += [problems_of_file(done, listed, verify=verify) for done in found]
    refuse(output_dir, [problem for problem in problems if problem])
    return found


def refuse_lost_splits(shards: Path) -> None:
    """Raise UserError if a split that was written below `shards` lost its manifest: training would do without validation."""
    for folder in (shards, shards.parent):  # with separate_sources the list lies one folder higher
        if (folder / LIST_FILE).is_file():
            lost = [folder / name for name in read_json(folder / LIST_FILE)["outputs"] if name.endswith("/manifest.json")]
            lost = [path for path in lost if path.parent.parent == shards and not path.is_file()]
            refuse(folder, [f"{path}: missing" for path in lost])


def refuse(output_dir: Path, problems: list[str]) -> None:
    """Raise UserError over problems, the first five by name, and say what to run."""
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UserError(
            "\n  ".join([f"{output_dir}: not what its stage wrote: {_what_to_run(output_dir)}", *problems[:5], *more])
        )


def _what_to_run(output_dir: Path) -> str:
    stage = read_json(output_dir / "stage.json").get("stage", "") if (output_dir / "stage.json").is_file() else ""
    tool = f"tools/{TOOLS[stage]}" if stage in TOOLS else "the tool that made it"
    return f"run {tool} again with the same settings and verify=true: it makes again what is missing or damaged, and only that"
