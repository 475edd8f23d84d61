"""What every benchmark here shares: peers' environments, interleaved runs of commands, and results with their provenance.

Times on shared cores mean nothing by themselves: compare only what ran in one `run_interleaved`, and quote ratios of medians.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megagpt.measurement import PROJECT

ENVIRONMENTS = PROJECT / "runs" / "bench" / "environments"
"""One virtual environment per peer (their pins exclude each other); ignored by git."""


@dataclass(frozen=True)
class Run:
    """One run of one command."""

    wall_s: float
    cpu_s: float
    """User and system time of the process and all that it started, waited for or not."""
    peak_rss_bytes: int
    """The largest resident set of any one process of it."""
    output: dict[str, Any]
    """The JSON object of its last line of standard output; empty where that is none."""


def run_interleaved(
    commands: Mapping[str, Sequence[str]],
    repetitions: int,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 3600,
) -> dict[str, list[Run]]:
    """Run all commands in turn, `repetitions` rounds of it, each as its own process; the order turns around every round.

    Raises:
        SystemExit: a command failed; its last lines are shown.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for round_number in range(repetitions):
        names = list(commands) if round_number % 2 == 0 else list(commands)[::-1]
        for name in names:
            run = run_once(commands[name], environment=environment, timeout_s=timeout_s)
            runs[name].append(run)
            print(f"round {round_number + 1}/{repetitions}  {name:40} {run.cpu_s:9.2f} CPU s  {run.wall_s:9.2f} s", flush=True)
    return runs


LAUNCHER = """
import ctypes, json, os, resource, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
process = subprocess.Popen(sys.argv[2:])
_, status = os.waitpid(process.pid, 0)
last = time.monotonic() + 30
while time.monotonic() < last:
    try:
        if os.waitpid(-1, os.WNOHANG)[0] == 0:
            time.sleep(0.01)
    except ChildProcessError:
        break
used = resource.getrusage(resource.RUSAGE_CHILDREN)
report = {"cpu_s": used.ru_utime + used.ru_stime, "peak_rss_bytes": used.ru_maxrss * 1024}
os.write(int(sys.argv[1]), json.dumps(report).encode())
sys.exit(min(255, abs(os.waitstatus_to_exitcode(status))))
"""
"""Starts a command from a small process: Linux counts into a child's ru_maxrss what its parent had when it started it. This
process waits for what the command leaves behind too, since only what was waited for is counted."""


def run_once(command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float = 3600) -> Run:
    """Run one command to its end; `environment` is added to ours."""
    with _text_file() as output, _text_file() as errors, _text_file() as report:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCHER, str(report.fileno()), *command],
            stdout=output,
            stderr=errors,
            pass_fds=[report.fileno()],
            cwd=PROJECT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        alarm = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        status = process.wait()
        alarm.cancel()
        wall_s = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        printed = output.read()
        if status != 0:
            tail = f"{printed[-2000:]}\n{errors.read()[-4000:]}"
            raise SystemExit(f"{shlex.join(command)}: exit status {status} after {wall_s:.0f} s\n{tail}")
        report.seek(0)
        used = json.load(report)
    found = _last_object(printed)
    return Run(wall_s, used["cpu_s"], int(found.get("peak_rss_bytes", used["peak_rss_bytes"])), found)


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """The Python of the peer's own environment, made on first use (needs a package index)."""
    folder = ENVIRONMENTS / name
    wanted = "\n".join(requirements)
    marker = folder / "requirements.txt"
    if not (marker.exists() and marker.read_text(encoding="utf-8") == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *requirements], check=True)
        marker.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def peer_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages as another environment has them."""
    code = "import json,sys;from importlib.metadata import version;print(json.dumps({p:version(p) for p in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout)


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _last_object(output: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
