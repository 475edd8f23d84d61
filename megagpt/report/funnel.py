"""The data funnel of a corpus: how many documents came into each stage, how many stayed, and why the others went. No torch."""

from pathlib import Path
from typing import Any

from megagpt.files import read_json
from megagpt.report.page import Bars, Block, Heading, Table

STAGES = ("extract", "filter", "dedup")
"""Folders of a corpus whose summary.json tells how many documents came and went, in order."""


def read_funnel(work_dir: Path) -> list[dict[str, Any]]:
    """The stages of a corpus that have run: each with `stage`, `documents_in`, `kept`, `rejected` and `faults`."""
    paths = [work_dir / stage / "summary.json" for stage in STAGES]
    found = [read_json(path) for path in paths if path.exists()]
    manifests = sorted((work_dir / "shards").rglob("manifest.json"))
    shards = [shard for path in manifests for shard in read_json(path)["shards"]]
    if shards:
        totals = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "text_bytes")}
        leaked = read_overlapping(work_dir)
        rejected = {"split:leak": leaked} if leaked else {}
        found.append({"stage": "shards", "kept": totals["documents"], **totals, "rejected": rejected, "faults": {}})
    return found


def read_overlapping(work_dir: Path) -> int:
    """Training documents that were left out for their likeness to validation documents."""
    path = work_dir / "shards" / "summary.json"
    return read_json(path).get("leaked_documents", 0) if path.exists() else 0


def show_funnel(name: str, stages: list[dict[str, Any]], *, max_rows: int = 20) -> list[Block]:
    """Bars of what was left after each stage, and tables of reasons and of damage."""
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
        blocks += [Heading("why documents went"), Table(head, lost[:max_rows], numbers=(2, 3))]
    if faults:
        head = ("stage", "kind", "times")
        blocks += [Heading("damage met in the input"), Table(head, faults[:max_rows], numbers=(2,))]
    return blocks


def big(number: float) -> str:
    """Three digits and a letter: 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
