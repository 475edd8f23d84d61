"""Exports beside training: rank 0 gives committed checkpoints to tools/export_model.py, one at a time, at low priority.

    exports/step_00001000/     what export_model wrote and compared (docs/weights.md); `.tmp-step_*` until it is whole
            step_00001000.log  its output, if it failed

A thread waits for the tool's process and deletes old exports; the loop only asks which exports have ended. A failed
export never stops the training: it is a row of metrics.jsonl.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import psutil

from megagpt.checkpoint.on_disk import list_checkpoints, step_of
from megagpt.checkpoint.ownership import still_owner
from megagpt.checkpoint.save_load import Saver
from megagpt.command import EXIT_DONE
from megagpt.config import UserError
from megagpt.convert.families import family_for
from megagpt.distributed.world import LAUNCHERS, SIZELESS, World
from megagpt.files import read_json, sha256_file
from megagpt.model.gpt import ModelConfig
from megagpt.monitor.monitor import Monitor
from megagpt.shipped import tool_file

log = logging.getLogger(__name__)

GATE_MEMORY_BYTES = 4_000_000_000
"""export_model's gate_memory_bytes: the host's memory is the training's."""
STALL_SECONDS = 300.0
"""An export that used no CPU time for this long is ended: its disk hangs."""
LOOK_SECONDS = 0.2

_RUN_TOOL = """
import contextlib, ctypes, os, runpy, signal, sys
os.nice(10)
with contextlib.suppress(OSError):
    open("/proc/self/oom_score_adj", "w").write("1000")
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a tool that gets a tenth of what a training process gets of a core that both want (at nice 19 it would starve beside
busy cores), is the first to go when memory runs out, and is interrupted (PR_SET_PDEATHSIG) when the training dies."""


def refuse_exports(model: ModelConfig) -> None:
    """Raise UserError if no checkpoint of the run could be exported."""
    if find_spec("transformers") is None:
        raise UserError("export_every_steps: transformers is not installed: exports need megagpt[convert]")
    try:
        family_for(model)
    except UserError as error:
        raise UserError(f"export_every_steps: {error}") from None


class BackgroundExports:
    """The exports of one start of a run. On ranks other than 0 only `wait` does anything.

    While one is made the newest checkpoint that is due waits; an older one that waited is left out. When this context is left,
    what is still being exported is ended.
    """

    def __init__(
        self, run_dir: Path, world: World, monitor: Monitor, attempt: int, *, every_steps: int, keep_last: int
    ) -> None:
        self._run_dir, self._world, self._monitor, self._attempt = run_dir, world, monitor, attempt
        self._every_steps, self._keep_last = every_steps, keep_last
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._waiting: int | None = None
        self._current: int | None = None
        self._thread: threading.Thread | None = None
        self._told: SimpleQueue[Mapping[str, object]] = SimpleQueue()
        if every_steps > 0 and world.rank == 0:
            for left in (run_dir / "exports").glob(".tmp-step_*"):  # the machine went down
                shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> "BackgroundExports":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def after(self, saver: Saver, step: int) -> None:
        """Export the checkpoint of `step` once the saver has committed it."""
        if self._every_steps > 0 and step % self._every_steps == 0:
            saver.then(lambda: self._offer(step))

    def catch_up(self, step: int) -> None:
        """At a start at `step`: export the newest checkpoint that was due, if a stop ended its export."""
        if self._every_steps == 0 or self._world.rank != 0:
            return
        found = [of_step for of_step in map(step_of, list_checkpoints(self._run_dir)) if 0 < of_step <= step]
        due = [of_step for of_step in found if of_step % self._every_steps == 0]
        if due:
            self._offer(due[-1])

    def in_use(self) -> set[int]:
        """Steps whose checkpoints must not be deleted now. Any thread may call it."""
        with self._lock:
            return {step for step in (self._current, self._waiting) if step is not None}

    def look(self, step: int) -> None:
        """Log what has ended since the last call; `step` updates are done. Waits for nothing."""
        while not self._told.empty():
            self._monitor.log("export", step, **self._told.get())

    def wait(self, step: int) -> None:
        """Until nothing is being exported; all ranks call it together. A stop signal on any of them ends the export."""
        if self._every_steps == 0:
            return
        while True:
            busy, told = self._world.sum([self._thread is not None, bool(self._world.stop.signal_name)])
            if told:
                self.end()
            self.look(step)
            if told or not busy:
                return
            self._world.progress()  # an export that hangs is ended by its own thread
            time.sleep(LOOK_SECONDS)

    def begin_to_end(self) -> None:
        """Ask the running export to end, without waiting for it; no export begins after this."""
        with self._lock:
            self._waiting = None
            self._ending.set()

    def end(self) -> None:
        """End the running export and remove its files; no export begins after this."""
        self.begin_to_end()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(10.0)  # a process that waits for a dead disk cannot even be killed

    # ---- the saver's thread

    def _offer(self, step: int) -> None:
        with self._lock:
            if self._ending.is_set():
                return
            if self._waiting is not None:
                self._tell(self._waiting, "left out", f"the export of step {self._current} was still being made", 0.0)
            self._waiting = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="exports", daemon=True)
                self._thread.start()

    # ---- the thread "exports"

    def _work(self) -> None:
        while True:
            with self._lock:
                self._current, self._waiting = self._waiting, None
                if self._current is None:
                    self._thread = None
                    return
                step = self._current
            began = time.monotonic()
            try:
                status, message = self._export(step)
            except Exception as error:  # whatever it is, training goes on
                log.debug("export of step %d", step, exc_info=True)
                status, message = "failed", f"{type(error).__name__}: {error}"
            if status:
                self._tell(step, status, message, time.monotonic() - began)

    def _export(self, step: int) -> tuple[str, str]:
        """(status, message); ("", "") where there was nothing to do."""
        name, folder = f"step_{step:08d}", self._run_dir / "exports"
        manifest, target = self._run_dir / "checkpoints" / name / "manifest.json", folder / name
        if not still_owner(self._run_dir, self._attempt):
            return "", ""
        if target.exists():
            if _source_of(target) == sha256_file(manifest):
                return "", ""
            _remove(target)  # of another branch: the run went back and came to this step again
        folder.mkdir(exist_ok=True)
        words = [f"run_dir={self._run_dir}", f"output_dir={target}", f"step={step}", f"gate_memory_bytes={GATE_MEMORY_BYTES}"]
        said = folder / f"{name}.log"
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _RUN_TOOL, str(tool_file("export_model")), *words],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's SIGINT is the training's
            )
        stalled = self._outlast(process)
        if process.returncode == EXIT_DONE:
            said.unlink()
            self._delete_old(target)
            return "written", str(target)
        shutil.rmtree(folder / f".tmp-{name}-{process.pid}", ignore_errors=True)
        if self._ending.is_set():
            said.unlink()
            return "ended", "the run ends"
        if stalled:
            return "failed", f"it did nothing for {STALL_SECONDS:.0f} s (see {said})"
        lines = said.read_text(errors="replace").strip().splitlines() or ["no message"]
        return "failed", f"status {process.returncode}: {lines[-1]} (see {said})"

    def _outlast(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait until the process has ended, by itself or with the run; True if it was ended because it did nothing."""
        used, moved_at = -1.0, time.monotonic()
        while process.poll() is None:
            stopped = self._ending.wait(LOOK_SECONDS)
            times = psutil.Process(process.pid).cpu_times()  # there until poll() has asked
            if times.user + times.system != used:
                used, moved_at = times.user + times.system, time.monotonic()
            stalled = time.monotonic() - moved_at > STALL_SECONDS
            if stopped or stalled:
                process.kill()
                process.wait()
                return stalled
        return False

    def _delete_old(self, newest: Path) -> None:
        """Delete all exports but the newest `keep_last`."""
        made = sorted((path for path in newest.parent.glob("step_*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in made[: -self._keep_last]:
            if path != newest:
                _remove(path)

    def _tell(self, of_step: int, status: str, message: str, duration: float) -> None:
        self._told.put({"of_step": of_step, "status": status, "message": message, "duration": round(duration, 3)})


def _environment() -> dict[str, str]:
    """The environment of a single process without a GPU."""
    places = {name for names in LAUNCHERS.values() for name in names} | set(SIZELESS)
    return {name: value for name, value in os.environ.items() if name not in places} | {"CUDA_VISIBLE_DEVICES": ""}


def _source_of(export: Path) -> str:
    """The sha256 of the manifest of the checkpoint that an export was made from; "" if it cannot be read."""
    try:
        return str(read_json(export / "checked.json")["source"]["manifest_sha256"])
    except (UserError, KeyError, TypeError):
        return ""


def _remove(export: Path) -> None:
    """Delete an export. If this is killed half-way, the rest has a name that the next start deletes."""
    leaving = export.rename(export.with_name(f".tmp-{export.name}-old"))
    shutil.rmtree(leaving)
