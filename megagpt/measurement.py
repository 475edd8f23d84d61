"""The record of a measurement: results as JSON with date, command, commit, machine and versions."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "bench" / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of a few measurements with the smallest and the largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def write_results(
    name: str, results: Mapping[str, Any], *, packages: Sequence[str] = (), peers: Mapping[str, str] | None = None
) -> Path:
    """Write bench/results/<name>.json: the results with date, machine, versions, commit and the command that made them.

    bench/document.py makes docs/benchmarks.md of these files. It shows, of `results`:
        title: heading of the section.   about: a paragraph: what is compared, on which data, what is good.
        rows: a table: flat objects with the same keys; a key is words, the unit last: `save_blocked_s`, `ratio_to_peer`.
        tables: further tables, a list of {"title", "about", "rows"}.
        lost: a paragraph on each number that a peer wins, with the reason; "" = none is lost.
    Other keys (raw runs) stay in the file for those who look. Values: str, number, bool, null or spread().
    """
    document = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *_program(), *_relative(sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "versions": {package: version(package) for package in packages},
        "peers": dict(peers or {}),
        "results": results,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, default=_jsonable) + "\n", encoding="utf-8")
    print(f"results in {path.relative_to(PROJECT)}", flush=True)
    return path


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no name of it."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_1m": os.getloadavg()[0],
    }


def _jsonable(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _program() -> list[str]:
    """How this program was started: `-m package.module`, or its file below the project."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name] if spec else _relative(sys.argv[:1])


def _relative(words: Sequence[str]) -> list[str]:
    """Command words without this machine's folders: paths of the project are shortened, others become FOLDER."""
    result = []
    for word in words:
        key, equals, value = word.rpartition("=")
        path = Path(value).resolve()
        if path.exists() and path.is_relative_to(PROJECT):
            value = str(path.relative_to(PROJECT))
        elif value.startswith(("/", "../")):
            value = "FOLDER"
        result.append(f"{key}{equals}{value}")
    return result


def commit() -> str:
    """The commit that is checked out; empty outside a clone."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
