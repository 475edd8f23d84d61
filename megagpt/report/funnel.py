"""The data funnel of a corpus: how many documents entered each stage, how many it kept, and why it dropped others. No torch."""

from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.report.page import Bars, Block, Heading, Table

STAGES = ("extract", "filter", "dedup")
"""Folders of a corpus, in order, whose summary.json has the numbers of documents in and kept."""


def read_funnel(work_dir: Path) -> list[dict[str, Any]]:
    """The stages of a corpus that have run: each with `stage`, `documents_in`, `kept`, `rejected` and `faults`.

    Raises UserError that names the file if a summary or a manifest is damaged.
    """
    paths = [work_dir / stage / "summary.json" for stage in STAGES]
    found = [_read_stage(path) for path in paths if path.exists()]
    totals: dict[str, Any] = dict.fromkeys(("documents", "tokens", "text_bytes"), 0)
    for path in sorted((work_dir / "shards").rglob("manifest.json")):
        value = read_json(path)
        try:
            totals = {name: total + sum(shard[name] for shard in value["shards"]) for name, total in totals.items()}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: not a manifest of shards ({error})") from None
    if totals["documents"]:
        leaked = read_overlapping(work_dir)
        rejected = {"split:leak": leaked} if leaked else {}
        found.append({"stage": "shards", "kept": totals["documents"], **totals, "rejected": rejected, "faults": {}})
    return found


def _read_stage(path: Path) -> dict[str, Any]:
    value = read_json(path)
    kinds = {"stage": str, "documents_in": int, "kept": int, "rejected": dict, "faults": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(value, dict) or not isinstance(value.get(name), kind)]
    if wrong:
        raise UserError(f"{path}: damaged: not a summary of a stage ({', '.join(wrong)} missing or of a wrong type)")
    return value


def read_overlapping(work_dir: Path) -> int:
    """Number of training documents that were left out because they are similar to validation documents."""
    path = work_dir / "shards" / "summary.json"
    return read_json(path).get("leaked_documents", 0) if path.exists() else 0


def show_funnel(name: str, stages: list[dict[str, Any]], *, max_rows: int = 20) -> list[Block]:
    """Bars of the documents left after each stage, and tables of reasons and of malformed records."""
    first = max(1, stages[0].get("documents_in", stages[0]["kept"]))
    rows = []
    if "documents_in" in stages[0]:
        rows.append((f"before {stages[0]['stage']}", 1.0, f"{first:,} documents", 1))
    for stage in stages:
        size = f" · {big(stage['tokens'])} tokens" if "tokens" in stage else ""
        label = "in shards" if stage["stage"] == "shards" else f"after {stage['stage']}"
        rows.append((label, stage["kept"] / first, f"{stage['kept']:,} · {stage['kept'] / first:.1%}{size}", 1))
    lost = [
        (stage["stage"], reason, f"{count:,}", f"{count / first:.1%}")
        for stage in stages
        for reason, count in sorted(stage["rejected"].items(), key=lambda item: -item[1])
    ]
    faults = [
        (s["stage"], kind, f"{n:,}") for s in stages for kind, n in sorted(s["faults"].items(), key=lambda item: -item[1])
    ]
    blocks: list[Block] = [Heading(name), Bars(rows)] if name else [Bars(rows)]
    if lost:
        head = ("stage", "reason", "documents", "share")
        blocks += [Heading("why documents were dropped"), Table(head, lost[:max_rows], numbers=(2, 3))]
    if faults:
        head = ("stage", "kind", "times")
        blocks += [Heading("malformed records in the input"), Table(head, faults[:max_rows], numbers=(2,))]
    return blocks


def big(number: float) -> str:
    """A number with three digits and a letter: 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
