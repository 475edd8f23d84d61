"""The portable checkpoint: written by any engine, ZeRO stage and number of ranks, read by any other, with no conversion step.

A checkpoint is a set of 1-D fp32 tensors, `param.<name>` and `<optimizer state>.<name>`, of each parameter's full flattened
length. Every rank writes the partitions that it holds (engine.Partition) into one safetensors file of its own. On load, each
rank reads only the ranges that overlap its own partitions. safetensors holds no code, so loading runs none.

    step_00001000/  pieces_00000.safetensors ...  one file per rank; its header says where each partition begins
                    state.json                    TrainState, config, data fingerprint, the start that wrote it
                    manifest.json                 size and sha256 of every file above; written last
                    scores.json                   scores of this step, by validation set; added afterwards

Ranks write into `tmp_<attempt>_step_...` and fsync; rank 0 renames it when every rank has succeeded. A checkpoint counts
only if its manifest verifies. The attempt grows with each start of the run (owner.json) and is compared
before the rename, so a rank left over from an earlier start cannot commit (ownership.py); between that check and the rename a
window of microseconds stays open.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from megagpt.checkpoint.host_memory import HostCopy, refuse_small_node
from megagpt.checkpoint.on_disk import FORMAT, list_checkpoints, read_state, saved_field, step_of
from megagpt.checkpoint.ownership import still_owner
from megagpt.checkpoint.partitions import (
    CheckpointError,
    Shares,
    index_of,
    own_share,
    problems_of,
    read_partitions,
    write_partitions,
)
from megagpt.checkpoint.scores import mark_best, read_best, value_of
from megagpt.config import UserError
from megagpt.data.state import TrainState
from megagpt.distributed.world import World, utc_now
from megagpt.engine.base import Engine
from megagpt.files import sha256_file, sync, write_json

log = logging.getLogger(__name__)

Check: TypeAlias = Callable[[Path, dict[str, Any]], None]
"""Gets a checkpoint's path and its state.json; raises to refuse it."""


@dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint besides its tensors."""

    path: Path
    state: TrainState
    saved: dict[str, Any]
    """state.json as it was written."""
    passed_over: tuple[str, ...]
    """Newer checkpoints that were not good, each with the reason."""


class Saver:
    """Writes the checkpoints of one start of a run, one at a time; in the background if asked.

    In the background the step waits only while this rank's partitions are copied to host memory; files, agreement and commit
    happen in a thread with a process group of its own. An error there is raised on every rank by the next call.
    """

    def __init__(self, run_dir: Path, world: World, attempt: int, *, background: bool = False) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._world = world.with_own_group() if background else world
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver") if background else None
        self._pending: Future[Path] | None = None
        self._host = HostCopy()

    def prepare(self, engine: Engine) -> None:
        """Take the host memory for background saves now: page-locking it takes seconds. Raises UserError, on all ranks, if some
        node has too little."""
        if self._thread is not None:
            refuse_small_node(engine, self._world)
            self._parts({key: own_share(partition)[1] for key, partition in engine.state().items()})

    def save(
        self,
        engine: Engine,
        state: TrainState,
        info: Mapping[str, Any],
        after: Callable[[Path], None] | None = None,
    ) -> None:
        """Save `run_dir/checkpoints/step_<step>`; all ranks call it together.

        `info` (JSON) goes into state.json beside the TrainState; `after(path)` runs on rank 0 once it is committed. Raises
        CheckpointError on every rank if any rank could not write, UserError if another start has taken the run over; nothing
        that was committed before is touched.
        """
        self.wait()
        saved = {"format": FORMAT, "train_state": state.to_json(), "updates": engine.updates, **info}
        shares = {key: own_share(partition) for key, partition in engine.state().items()}
        if self._thread is None:
            self._write(shares, state.step, saved, after)
            return
        self._pending = self._thread.submit(self._write, self._copy(shares), state.step, saved, after)

    def then(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 once the save in progress is committed, but not if it failed, nor if a later start has taken
        the run over. The action must not raise."""
        pending = self._pending
        if self._world.rank != 0:
            return

        def run() -> None:
            if (pending is None or not pending.exception()) and still_owner(self._run_dir, self._attempt):
                action()

        if self._thread is None or pending is None:
            run()
        else:  # the thread is one: by then `pending` has ended
            self._thread.submit(run)

    def wait(self) -> None:
        """Wait until the save in progress is committed. Raises CheckpointError as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save in progress and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._host.release()

    def _copy(self, shares: Shares) -> Shares:
        """The shares in host memory."""
        copies, parts = {}, self._parts({key: data for key, (_, data) in shares.items()})
        for key, (start, data) in shares.items():
            copies[key] = (start, parts[key].copy_(data, non_blocking=True))
            self._world.progress()
        if any(data.is_cuda for _, data in shares.values()):
            torch.cuda.synchronize()
        return copies

    def _parts(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_gpu = any(tensor.is_cuda for tensor in data.values())
        return self._host.parts({key: len(tensor) for key, tensor in data.items()}, page_locked=on_gpu)

    def _write(self, shares: Shares, step: int, saved: dict[str, Any], after: Callable[[Path], None] | None) -> Path:
        world, folder = self._world, self._run_dir / "checkpoints"
        final, temporary = folder / f"step_{step:08d}", folder / f"tmp_{self._attempt}_step_{step:08d}"
        self._refuse_if_lost()
        made = _attempt(lambda: temporary.mkdir(parents=True, exist_ok=True)) if world.rank == 0 else None
        made = world.broadcast(made)
        outcomes = world.gather(made or _attempt(lambda: write_partitions(temporary, world.rank, shares, world.progress)))
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
        if not failures and world.rank == 0:
            files: dict[str, Any] = dict(outcomes)
            failure = _attempt(lambda: _commit(self._run_dir, temporary, final, files, saved, self._attempt))
            failures = [f"rank 0: {failure}"] if isinstance(failure, str) else []
        failures = world.broadcast(failures)
        if failures:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self._refuse_if_lost()  # the later start may have come, and removed the files, while they were written
            raise CheckpointError(f"{final} was not saved: {'; '.join(failures)}")
        if after is not None and world.rank == 0:
            after(final)
        return final

    def _refuse_if_lost(self) -> None:
        """Raise UserError on every rank if a later start has taken the run over."""
        if self._world.broadcast(self._world.rank == 0 and not still_owner(self._run_dir, self._attempt)):
            raise UserError(f"{self._run_dir}: a later start has taken this run over; attempt {self._attempt} saves nothing")


def restore(
    run_dir: Path,
    engine: Engine,
    world: World,
    *,
    step: int | None = None,
    attempt: int | None = None,
    check: Check | None = None,
) -> Restored | None:
    """Load the newest good checkpoint (or that of `step`) into the engine; None if there is none. All ranks call it together.

    Every file's sha256 is verified first, by all ranks together; a checkpoint that fails is passed over for the next older
    one. `check(path, state.json)` may raise to refuse it. Raises CheckpointError if `step` is named and not good, or if
    all checkpoints are damaged. `step` is the `resume_step` of the run's settings: newer checkpoints that were made after a
    start with the same one are its continuation, and the newest of them is loaded. With `attempt` this start owns the run:
    newer checkpoints that are not used are renamed to `aside_*`, so that later checkpoints are not mixed up with them.
    """
    path, passed_over = newest_good(run_dir, world, step=step)
    if path is None:
        return None
    restored = _load(path, engine, world, check, passed_over)
    if attempt is not None and world.rank == 0 and still_owner(run_dir, attempt):
        set_aside(run_dir, newer_than=step_of(path), attempt=attempt)
    return restored


def restore_exactly(path: Path, engine: Engine, world: World, *, check: Check | None = None) -> Restored:
    """Load this one checkpoint, of any run. Raises CheckpointError if it is not good."""
    problems = problems_of(path, world)
    if problems:
        raise CheckpointError("; ".join(problems))
    return _load(path, engine, world, check, ())


def _load(path: Path, engine: Engine, world: World, check: Check | None, passed_over: tuple[str, ...]) -> Restored:
    saved = read_state(path)
    if check is not None:
        check(path, saved)
    partitions = engine.state()
    held = world.broadcast(sorted(_kinds(index_of(path))) if world.rank == 0 else None)
    if world.any(not _kinds(partitions).issubset(held)):
        log.warning("%s: was made with another optimizer: the states of this one begin at zero", path)
        for partition in partitions.values():
            partition.data.zero_()
        partitions = {key: partition for key, partition in partitions.items() if key.startswith("param.")}
        saved["updates"] = 0
    read_partitions(path, partitions, world)
    engine.refresh(saved["updates"])
    return Restored(path, TrainState.from_json(saved["train_state"]), saved, passed_over)


def _kinds(names: Iterable[str]) -> set[str]:
    """`param` and the optimizer's states, without the parameters' names."""
    return {name.partition(".")[0] for name in names}


def set_aside(run_dir: Path, *, newer_than: int, attempt: int) -> None:
    """Rename newer checkpoints to `aside_<attempt>_step_*`: damaged ones, and those of an abandoned branch."""
    leaving = [path for path in list_checkpoints(run_dir) if step_of(path) > newer_than]
    best = run_dir / "checkpoints" / "best.json"
    of_best = read_best(run_dir)
    if of_best.get("step", -1) > newer_than:
        best.unlink()
        for path in list_checkpoints(run_dir)[: -len(leaving) or None]:
            measured, metric = of_best.get("validation_set"), of_best.get("metric")
            value = value_of(path, measured, metric)
            if value is not None:
                mark_best(run_dir, step_of(path), value, measured, metric=metric)
    for path in leaving:
        path.rename(path.with_name(f"aside_{attempt}_{path.name}"))
        log.warning("%s is not used; it was renamed to aside_%d_%s", path, attempt, path.name)


def newest_good(run_dir: Path, world: World, *, step: int | None = None) -> tuple[Path | None, tuple[str, ...]]:
    """The newest checkpoint (or that of `step` and what continues it) whose files verify; why newer ones were not taken."""
    passed_over: list[str] = []
    # Rank 0 says which there are: a network disk may show the others more or less.
    candidates = world.broadcast(_candidates(run_dir, step) if world.rank == 0 else None)
    if step is not None and not candidates:
        raise UserError(f"{run_dir / 'checkpoints'}: there is no checkpoint of step {step}")
    for path in reversed(candidates):
        problems = problems_of(path, world)
        if not problems:
            return path, tuple(passed_over)
        passed_over.append("; ".join(problems))
    if passed_over:
        raise CheckpointError("no checkpoint is good: " + " | ".join(passed_over))
    return None, ()


def _candidates(run_dir: Path, step: int | None) -> list[Path]:
    """All; with `step` that of the step, if it is still there, and those made after a start with `resume_step` at it."""
    committed = list_checkpoints(run_dir)
    if step is None:
        return committed
    newer = [
        path for path in committed if step_of(path) > step and (saved_field(path, "config") or {}).get("resume_step") == step
    ]
    return [path for path in committed if step_of(path) == step] + newer


def prune(run_dir: Path, *, keep_last: int, keep_every_steps: int = 0, in_use: Collection[int] = ()) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last`, the best, multiples of keep_every_steps and those of the steps
    `in_use`; returns the deleted ones."""
    best_step = read_best(run_dir).get("step", -1)
    committed = list_checkpoints(run_dir)
    whole = [path for path in committed if (path / "manifest.json").exists()]  # a deletion that was killed leaves none
    newest, removed = whole[-max(1, keep_last) :], []
    for path in committed:
        step = step_of(path)
        kept = path in newest or step == best_step or step in in_use or (keep_every_steps > 0 and step % keep_every_steps == 0)
        if kept and path in whole:
            continue
        (path / "manifest.json").unlink(missing_ok=True)  # from here on it does not exist, however far the deletion comes
        shutil.rmtree(path)
        removed.append(path)
    return removed


def _commit(run_dir: Path, temporary: Path, final: Path, files: dict[str, Any], saved: dict[str, Any], attempt: int) -> None:
    """Write state and manifest, then rename: from then on the checkpoint exists."""
    write_json(temporary / "state.json", {**saved, "incarnation": attempt, "saved_at": utc_now()})
    seal(temporary, files)
    if not still_owner(run_dir, attempt):
        raise CheckpointError(f"{run_dir / 'owner.json'}: a later start owns this run; attempt {attempt} may not commit")
    if final.exists():  # the same step again, after a rewind
        _replace(final, temporary, final.with_name(f"tmp_{attempt}_old_{final.name}"))
    else:
        temporary.rename(final)
    sync(final.parent)


def _replace(final: Path, temporary: Path, old: Path) -> None:
    """Put `temporary` in the place of `final`. A kill between the renames leaves `old`; take_ownership restores it."""
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old)


def seal(folder: Path, files: dict[str, Any]) -> None:
    """Write the manifest over `files` (name -> size and sha256) and state.json; the folder is then a whole checkpoint."""
    state_path = folder / "state.json"
    state = {"size": state_path.stat().st_size, "sha256": sha256_file(state_path)}
    write_json(folder / "manifest.json", {"files": {**files, "state.json": state}})
    sync(folder)


def _attempt(action: Any) -> Any:
    """The action's result, or what went wrong as text, so that all ranks can agree."""
    try:
        return action()
    except (OSError, CheckpointError, UserError) as error:
        return str(error) or type(error).__name__
