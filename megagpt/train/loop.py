"""Training: the one loop, and what happens between its steps."""

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint.base_weights import base_path, base_record, load_base
from megagpt.checkpoint.new_rows import NewRows
from megagpt.checkpoint.on_disk import list_checkpoints, read_state, step_of
from megagpt.checkpoint.ownership import Ownership, still_owner, take_run
from megagpt.command import EXIT_DONE, EXIT_STOPPED
from megagpt.config import UserError
from megagpt.data.loader import Loader
from megagpt.data.open_data import Data, open_data
from megagpt.data.sample_ledger import LedgerWriter
from megagpt.data.state import TrainState
from megagpt.distributed.determinism import make_deterministic, use_tf32
from megagpt.distributed.mesh import with_context_parallel
from megagpt.distributed.world import Stopped, StopRequest, World, abort_world, close_world, init_world
from megagpt.engine.build import build_engine
from megagpt.engine.dtypes import declared_formats
from megagpt.engine.initial_weights import draw_weights
from megagpt.evaluate.scores_in_training import read_questions
from megagpt.model.flops import flops_per_token
from megagpt.monitor.monitor import Monitor, OpenPanel
from megagpt.settings_record import recorded
from megagpt.train import preflight
from megagpt.train.background_export import BackgroundExports
from megagpt.train.between_steps import due, due_at, evaluate_and_sample, left_by_a_stop, save, stops_early
from megagpt.train.config import TrainConfig
from megagpt.train.data_changes import continue_mixture
from megagpt.train.out_of_memory import Planner, explaining_out_of_memory
from megagpt.train.profile import StepProfiler, remember_allocations
from megagpt.train.run import Run
from megagpt.train.spike_guard import Guard
from megagpt.train.step import Judge, Launch, Launched, Prepared, prepare
from megagpt.watchdog.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: TrainConfig, planner: Planner | None = None, open_panel: OpenPanel | None = None) -> int:
    """Start or resume a run until max_steps or a stop signal; returns the exit status (0 done, 75 stopped and saved).

    Raises UserError before any work if configuration, data, tokenizer or an earlier checkpoint do not fit together, and Failure
    if a step runs out of memory; `planner` adds what it was expected to hold, `open_panel` opens what monitor.panel asks for.
    """
    data = open_data(config.data)
    preflight.check_run(config, data)
    # Before any thread and rank depends on the working directory, which reading the harness's tasks moves for a while.
    questions = read_questions(config.score, seq_len=config.model.seq_len) if config.score.asks else None
    if config.check:
        return EXIT_DONE
    if config.determinism != "none":
        make_deterministic()
    use_tf32(config.tf32)
    stop = StopRequest()
    stop.install()
    stop.end_at_once()
    world = init_world(stop=stop, wanted_device=config.device)
    world = with_context_parallel(world, config.engine.context_parallel_size)
    monitor = watchdog = owned = None
    try:
        settings = digest_settings(config, data)
        world.refuse_difference("every rank needs the same settings and data", settings)
        owned = take_run(config.run_dir, world, config.if_running)
        if owned is None:
            return EXIT_STOPPED
        attempt = owned.attempt
        world.together(partial(preflight.record_start, config, data, world, attempt))
        monitor = world.together(partial(open_monitor, config, world, attempt, open_panel))
        stop.end_at_once(partial(last_words, owned, monitor))
        watchdog = Watchdog(config.watchdog, world, config.run_dir, monitor.clock, attempt)
        if config.watchdog.enabled:
            world.leave_hangs_to_a_watchdog()
        remember_allocations(config.profile, world.device)
        with monitor.clock("load"):
            memory: dict[str, Any] = {"planner": planner, "attempt": attempt}
            with explaining_out_of_memory(config, None, world, 0, monitor.clock, when="as the engine was built", **memory):
                engine = build_engine(config.model, config.optim, config.engine, world, **config.engine_options)
            watchdog.collective_waits = engine.collective_waits
            guard = Guard(config.guard, config.run_dir)
            saver = checkpoint.Saver(config.run_dir, world, attempt, background=config.save_in_background)
            every, keep_last = config.export_every_steps, config.export_keep_last
            exports = BackgroundExports(config.run_dir, world, monitor, attempt, every_steps=every, keep_last=keep_last)
            run = Run(
                config, data, world, engine, monitor, watchdog, guard, attempt, saver, exports, settings, questions, planner
            )
            with explaining_out_of_memory(config, engine, world, 0, monitor.clock, when="as weights were loaded", **memory):
                state = restore_or_start(run)
            saver.prepare(engine)
        world.together(partial(preflight.record_settings, config, data, world))
        ledger = world.together(lambda: LedgerWriter(config.run_dir) if world.rank == 0 else None)
        with exports:
            status = loop(run, state, ledger)
        owned.refuse_if_lost()
        if status == EXIT_STOPPED:
            world.stop.ignore()
        watchdog.close()
        monitor.close()
        world.barrier()  # while rank 0 sends the rest to W&B no other ends: srun waits only so long after the first
        return status
    except Stopped:  # on all ranks at the same place, before the first update
        world.stop.ignore()
        return EXIT_STOPPED
    except UserError:
        world.stop.ignore()  # as below: all ranks end with 2, and none of them by srun's SIGTERM
        raise
    except Exception:
        if watchdog is not None:
            watchdog.end_if_judged()
        if monitor is not None and owned is not None and stop_mark(owned).exists():  # another rank has ended at once
            last_words(owned, monitor, "another rank was told to stop")
            return EXIT_STOPPED
        if world.device.type == "cuda":
            # Leaving the process group waits for kernels that may never end: the traceback first, then no waiting.
            log.exception("rank %d ends:", world.rank)
            abort_world()
        raise
    finally:
        if watchdog is not None:
            watchdog.close()
        if monitor is not None:
            monitor.close()
        if owned is not None:
            owned.close()
        close_world()


def loop(run: Run, state: TrainState, ledger: LedgerWriter | None) -> int:
    """Updates until max_steps or a stop signal, with all that happens between them.

    A step is launched, and judged when its results have reached the host: at once, or (`results_come_late`) after the next step
    was launched. A step is always judged before its state is used, for a checkpoint above all.
    """
    config, world, monitor, watchdog = run.config, run.world, run.monitor, run.watchdog
    loader = Loader(
        run.data.train,
        global_batch_size=config.batch_size_at,
        micro_batch_size=config.micro_batch_size,
        rank=world.dp_rank,
        size=world.dp_size,
        document_mask=config.data.document_mask,
        full_rows=config.compile,
    )
    judge = Judge(run, ledger)
    launch = Launch(run)
    profiler = StepProfiler(config.profile, config.run_dir, world.rank, run.attempt, monitor.clock)
    late, saved_step = results_come_late(config, world), state.step  # at its beginning a run has nothing to save either
    watchdog.beat(state.step)
    run.exports.catch_up(state.step)
    kinds = left_by_a_stop(run, state)
    if state.step == 0 and config.init_from is not None:  # what tuning begins from, to be compared
        kinds = ("score",) * (run.questions is not None) + ("sample",) * (config.sample_every_steps > 0)
    score, interrupted = evaluate_and_sample(run, state, kinds, saved_step)
    early, stopping = stops_early(run), False
    unjudged: list[Launched] = []
    coming: Prepared | None = None
    with collecting_garbage_together() as collect_garbage:
        while state.step < config.max_steps and not (interrupted or early or stopping):
            coming = coming or prepare(run, loader, state)
            num_targets, fed_hash, num_told_to_stop, *by_source = coming.agreed()
            stopping, settles = num_told_to_stop > 0, True
            if not stopping:
                profiler.before(state.step)
                with explaining_out_of_memory(
                    config, run.engine, world, state.step, monitor.clock, run.planner, attempt=run.attempt
                ):
                    unjudged.append(launch(state, coming.batches, num_targets, fed_hash, by_source))
                state = unjudged[-1].after
                profiler.after(state.step)
                settles = not late or is_due(config, state.step)
                # While the device computes, the ranks agree on the step after; what is due comes first.
                coming = None if settles else prepare(run, loader, state)

            problem, condemned = "", None
            while len(unjudged) > (0 if settles else 1) and not problem:
                condemned = unjudged.pop(0)
                problem = judge(condemned)
            if problem and condemned is not None:
                if coming is not None and not stopping:
                    coming.agreed()  # and dropped, as is what was launched after the step in question
                unjudged, coming = [], None
                state, score = rewind(run, condemned.before, problem), None
                saved_step = state.step
                continue
            if stopping:
                break
            if due(config.save_every_steps, state.step) or state.step == config.max_steps:
                save(run, state)  # before anything that is not needed and takes long
                saved_step = state.step
            kinds = due_at(config, state.step)
            score, interrupted = evaluate_and_sample(run, state, kinds, saved_step)
            early = bool(kinds) and not interrupted and stops_early(run)
            run.exports.look(state.step)
            collect_garbage(state.step)
    profiler.close()
    stopped = bool(interrupted) or (state.step < config.max_steps and not early)
    if stopped:
        run.exports.begin_to_end()  # what waits for its end comes after the save
    if state.step != saved_step:
        save(run, state, score)
    loader.close()
    with monitor.clock("save"):
        run.saver.close()
        run.exports.wait(state.step)
    if stopped:
        more = {"interrupted": interrupted} if interrupted else {}
        monitor.log("stop", state.step, reason=world.stop.signal_name or "another rank was told to stop", **more)
        return EXIT_STOPPED
    ended = {"early_stop": config.early_stop_evaluations} if state.step < config.max_steps else {}
    monitor.log("done", state.step, tokens=state.tokens, **ended)
    return EXIT_DONE


def results_come_late(config: TrainConfig, world: World) -> bool:
    """Whether a step is judged after the next one was launched, so that a GPU is never idle."""
    return config.read_results == "late" or (config.read_results == "auto" and world.device.type == "cuda")


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether something after this step needs it to be judged: a checkpoint, an evaluation, a sample, the end."""
    return due(config.save_every_steps, step) or step == config.max_steps or bool(due_at(config, step))


def digest_settings(config: TrainConfig, data: Data) -> dict[str, str]:
    """A short digest of each setting that a resume may change and the loss depends on; of fields that came later only those
    that are set, so that a newer version is no change."""
    settings = recorded(config)
    values = {name: settings.get(name) for name in ("model", "optim", "max_steps", "precision", "float8")}
    values |= {"data": data.fingerprint}
    return {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8] for name, value in values.items()}


def restore_or_start(run: Run) -> TrainState:
    """The state of the newest good checkpoint, loaded into the engine, or fresh weights; logs those passed over."""
    state, restored = load_newest(run, run.config.resume_step)
    precision = declared_formats(run.config.precision, run.config.engine, run.config.optim)
    left_out = run.guard.summary()
    if left_out and run.world.rank == 0:
        log.warning("left out of training: %s, guard.enabled=%s", left_out, str(run.config.guard.enabled).lower())
    facts = {"precision": precision, **({"left_out": left_out} if left_out else {})}
    if restored is None:
        origin = None if run.config.init_from is None else str(run.config.init_from)
        run.monitor.log("start", 0, tokens=0, resumed=False, init_from=origin, **facts)
        return state
    if state.step > run.config.max_steps:
        raise UserError(f"max_steps={run.config.max_steps}: {restored.path} is further already")
    for reason in restored.passed_over:
        run.monitor.log("damaged", state.step, reason=reason)
    run.monitor.log("start", state.step, tokens=state.tokens, resumed=True, checkpoint=str(restored.path), **facts)
    return state


def rewind(run: Run, state: TrainState, problem: str) -> TrainState:
    """Leave out the samples from the step at `state` on, in which the guard saw a problem, and resume before it; or, if the
    guard withdraws its verdict on this step, use all samples."""
    config = run.config
    with run.monitor.clock("save"):
        run.saver.wait()  # before anything below may end the run: what was begun shall be committed
    # A rank left over from an earlier start must not leave samples out for the later one.
    write = run.world.rank == 0 and still_owner(config.run_dir, run.attempt)
    window = run.guard.condemn(state, problem, global_batch_size=config.batch_size_at(state.step), write=write)
    run.world.barrier()
    run.world.stop.nothing_to_save()  # all that counts is committed: a stop signal need not wait for the load
    with run.monitor.clock("load"):
        before, _ = load_newest(run, config.resume_step)
    skipped = None if window is None else {"start": window.start, "count": window.count}
    facts = {"tokens": before.tokens, "bad_step": state.step, "reason": problem, "skipped": skipped}
    run.monitor.log("rewind", before.step, **facts, taken_back=window is None)
    return before


def load_newest(run: Run, step: int | None) -> tuple[TrainState, checkpoint.Restored | None]:
    """Fill the engine from the newest good checkpoint (or that of `step`), with fresh weights if there is none."""
    config = run.config

    def check(path: Path, saved: dict[str, Any]) -> None:
        preflight.check_resume(config, run.data, saved, path)

    engine, world = run.engine, run.world
    restored = checkpoint.restore(config.run_dir, engine, world, step=step, attempt=run.attempt, check=check)
    if restored is None and config.continue_from is not None:
        restored = checkpoint.restore_exactly(config.continue_from, engine, world, check=check)
    if restored is None:
        draw_weights(engine, config.model, config.seed, world.progress, config.tune, world)
        if config.init_from is not None:
            path, _ = checkpoint.newest_good(config.init_from, world)
            if path is None:
                raise UserError(f"init_from={config.init_from}: there is no checkpoint in it")
            rows = preflight.check_initial(config, run.data, read_state(path), path)
            load_base(path, rows, engine, world, frozen_only=False)
            engine.refresh(0)
            run.base.update(base_record(path, rows))
    elif config.tune.freezes:
        run.base.update(restored.saved["base"])
        path, rows = base_path(run.base, restored.path, config.init_from), run.base["new_rows"]
        load_base(path, None if rows is None else NewRows(**rows), engine, world, frozen_only=True)
        engine.refresh(restored.saved["updates"])
    run.guard.restore(restored.saved.get("guard") if restored is not None else None)
    state = run.guard.apply(restored.state if restored is not None else TrainState())
    if restored is not None:
        state = continue_mixture(config.data, restored.saved, state, restored.path)
        world.together(partial(preflight.record_mixture, config, world, run.attempt, state))
    return state, restored


def stop_mark(owned: Ownership) -> Path:
    """The file by which a rank that ends at once tells the others of its attempt."""
    return owned.run_dir / "starts" / f"{owned.attempt:04d}.stopped"


def last_words(owned: Ownership, monitor: Monitor, reason: str) -> None:
    """Record a stop request that came before the first update: in metrics.jsonl (rank 0), and for the other ranks."""
    stop_mark(owned).touch()
    step = max((step_of(path) for path in list_checkpoints(owned.run_dir)), default=0)
    monitor.log_from_a_thread("stop", step, reason=reason)
    owned.close()  # the next start need not watch a heartbeat that has ended


def open_monitor(config: TrainConfig, world: World, attempt: int, open_panel: OpenPanel | None = None) -> Monitor:
    """The monitor of this start."""
    return Monitor(
        config.run_dir,
        config.monitor,
        run_config=config.model_dump(mode="json"),
        rank=world.rank,
        local_rank=world.local_rank,
        attempt=attempt,
        max_steps=config.max_steps,
        flops=flops_per_token(
            config.model,
            seq_len=config.data.seq_len,
            checkpoint_every=config.checkpoint_every,
            checkpoint_selectively=config.activation_checkpointing == "selective",
        ),
        num_devices=world.size,
        device=world.device,
        open_panel=open_panel,
    )


@contextmanager
def collecting_garbage_together(every_steps: int = 100) -> Iterator[Callable[[int], None]]:
    """Python's collector runs every n steps on all ranks at once, instead of pausing one rank at a time at random moments."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda step: gc.collect(1) if step % every_steps == 0 else None  # type: ignore[misc]
    finally:
        gc.enable()
        gc.unfreeze()
