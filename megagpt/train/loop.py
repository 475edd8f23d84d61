"""Training: the one loop, and what happens between its steps."""

import gc
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint import scores
from megagpt.checkpoint.base_weights import base_path, base_record, load_base
from megagpt.checkpoint.new_rows import NewRows
from megagpt.checkpoint.ownership import Ownership, still_owner, take_run
from megagpt.command import EXIT_DONE, EXIT_STOPPED
from megagpt.config import Failure, UserError
from megagpt.data.loader import Loader, MicroBatch, StepBatches
from megagpt.data.open_data import Data, open_data
from megagpt.data.permutation import mix
from megagpt.data.sample_hash import HASH_MASK
from megagpt.data.sample_ledger import LedgerWriter, entry_of
from megagpt.data.state import TrainState, sample_indices
from megagpt.distributed.determinism import make_deterministic
from megagpt.distributed.fetch import Record, Records
from megagpt.distributed.mesh import with_context_parallel
from megagpt.distributed.world import Stopped, StopRequest, World, abort_world, close_world, init_world
from megagpt.engine.base import Engine
from megagpt.engine.build import build_engine, draw_weights
from megagpt.engine.dtypes import check_formats, declared_formats, name_of
from megagpt.engine.optim import lr_at
from megagpt.evaluate.loss import combine, evaluate_sources, evaluation_mode, validation_set
from megagpt.evaluate.results import keep_result
from megagpt.evaluate.scores_in_training import Questions, numbers_of, read_questions, score_model
from megagpt.files import sha256_file
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.generate.text_stream import StreamDecoder
from megagpt.model.flops import flops_per_token
from megagpt.monitor.metrics import interrupted_at, read_metrics
from megagpt.monitor.monitor import Monitor
from megagpt.tokenizer.base import prompt_ids
from megagpt.train import preflight
from megagpt.train.background_export import BackgroundExports
from megagpt.train.config import TrainConfig
from megagpt.train.data_changes import continue_mixture, record_of
from megagpt.train.early_stop import evaluated_losses, used_up
from megagpt.train.feed import Feed
from megagpt.train.layer_norms import LayerNorms
from megagpt.train.out_of_memory import Planner, explaining_out_of_memory
from megagpt.train.profile import StepProfiler
from megagpt.train.spike_guard import Guard
from megagpt.watchdog.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one start of a run works with."""

    config: TrainConfig
    data: Data
    world: World
    engine: Engine
    monitor: Monitor
    watchdog: Watchdog
    guard: Guard
    attempt: int
    saver: checkpoint.Saver
    exports: BackgroundExports
    settings: dict[str, str]
    """See digest_settings."""
    questions: Questions | None = None
    """What it is scored by besides validation data."""
    planner: Planner | None = None
    """What a step is expected to hold, for the message when memory runs out."""
    base: dict[str, Any] = field(default_factory=dict)
    """Of a run that freezes something: the checkpoint that the frozen weights are from (checkpoint.base_weights)."""


def train(config: TrainConfig, planner: Planner | None = None) -> int:
    """Start or resume a run until max_steps or a stop signal; returns the exit status (0 done, 75 stopped and saved).

    Raises UserError before any work if configuration, data, tokenizer or an earlier checkpoint do not fit together, and Failure
    if a step runs out of memory; `planner` adds what it was expected to hold.
    """
    data = open_data(config.data)
    preflight.check_run(config, data)
    # Before any thread and rank depends on the working directory, which reading the harness's tasks moves for a while.
    questions = read_questions(config.score, seq_len=config.model.seq_len) if config.score.asks else None
    if config.check:
        return EXIT_DONE
    if config.determinism != "none":
        make_deterministic()
    stop = StopRequest()
    stop.install()
    stop.end_at_once()
    world = init_world(stop=stop, wanted_device=config.device)
    world = with_context_parallel(world, config.engine.context_parallel_size)
    monitor = watchdog = owned = None
    try:
        owned = take_run(config.run_dir, world, config.if_running)
        if owned is None:
            return EXIT_STOPPED
        attempt = owned.attempt
        preflight.record_start(config, data, world, attempt)
        monitor = open_monitor(config, world, attempt)
        stop.end_at_once(partial(last_words, owned, monitor))
        watchdog = Watchdog(config.watchdog, world, config.run_dir, monitor.clock, attempt)
        with monitor.clock("load"):
            engine = build_engine(config.model, config.optim, config.engine, world, **config.engine_options)
            guard = Guard(config.guard, config.run_dir)
            saver = checkpoint.Saver(config.run_dir, world, attempt, background=config.save_in_background)
            every, keep_last = config.export_every_steps, config.export_keep_last
            exports = BackgroundExports(config.run_dir, world, monitor, attempt, every_steps=every, keep_last=keep_last)
            settings = digest_settings(config, data)
            run = Run(
                config, data, world, engine, monitor, watchdog, guard, attempt, saver, exports, settings, questions, planner
            )
            state = restore_or_start(run)
        preflight.record_settings(config, data, world)
        with exports:
            status = loop(run, state)
        owned.refuse_if_lost()
        if status == EXIT_STOPPED:
            world.stop.ignore()
        watchdog.close()
        monitor.close()
        world.barrier()  # while rank 0 sends the rest to W&B no other ends: srun waits only so long after the first
        return status
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


def loop(run: Run, state: TrainState) -> int:
    """Updates until max_steps or a stop signal, with all that happens between them.

    A step is launched, and judged when what it has computed has reached the host: at once, or (`results_come_late`) after the
    next one has been launched. Before anything that a step's state is used for, a checkpoint above all, it is judged.
    """
    config, world, monitor, watchdog = run.config, run.world, run.monitor, run.watchdog
    loader = Loader(
        run.data.train,
        global_batch_size=config.batch_size_at,
        micro_batch_size=config.micro_batch_size,
        rank=world.dp_rank,
        size=world.dp_size,
        document_mask=config.data.document_mask,
    )
    judge = Judge(run, LedgerWriter(config.run_dir) if world.rank == 0 else None)
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
    coming: Coming | None = None
    with collecting_garbage_together() as collect_garbage:
        while state.step < config.max_steps and not (interrupted or early or stopping):
            coming = coming or prepare(run, loader, state)
            num_targets, fed_hash, told = coming.agreed()
            stopping, settles = bool(told), True
            if not stopping:
                profiler.before(state.step)
                with explaining_out_of_memory(config, run.engine, world, state.step, monitor.clock, run.planner):
                    unjudged.append(launch(state, coming.batches, num_targets, fed_hash))
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
        run.exports.end()
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
    """Whether a step is judged after the next one has been launched, so that a GPU is never without work."""
    return config.read_results == "late" or (config.read_results == "auto" and world.device.type == "cuda")


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether something after this step needs it to be judged: a checkpoint, an evaluation, a sample, the end."""
    return due(config.save_every_steps, step) or step == config.max_steps or bool(due_at(config, step))


@dataclass(frozen=True)
class Coming:
    """A step to be launched: this rank's micro-batches, and what the ranks agree on (`agreed`, to be called once): targets,
    hash of the samples, how many ranks were told to stop when it was prepared."""

    batches: StepBatches
    agreed: Callable[[], list[int]]


def prepare(run: Run, loader: Loader, state: TrainState) -> Coming:
    """Take the micro-batches of the step at `state` and begin to agree on it."""
    world = run.world
    with run.monitor.clock("data_wait"):
        batches = loader.step(state)  # pure in TrainState: a rewind is only another state
    stop = bool(world.stop.signal_name)
    return Coming(batches, world.begin_sum([world.counts * batches.num_targets, world.counts * batches.fed_hash, stop]))


@dataclass(frozen=True)
class Launched:
    """A step that was launched: the states before and after it, and what it has computed, on its way to the host."""

    before: TrainState
    after: TrainState
    batch_size: int
    fed_hash: int
    lr: float
    loss_format: str
    micro_batches: int
    terms: tuple[str, ...]
    """Names of what is added to the loss."""
    record: Record
    """Per rank: the loss of each micro-batch, the gradients' norm, whether the update was applied, then each term of each
    micro-batch; terms and losses as shares of the step's mean."""
    norms: dict[str, dict[str, float]] | None
    """By layer, where they were due."""


class Launch:
    """Launches steps. With FSDP and AdamW nothing in it waits for the device, but where norms by layer are due."""

    def __init__(self, run: Run) -> None:
        self._run, self._feed, self._records = run, Feed(run.world.device), Records(run.world)
        self._norms = LayerNorms(run.config.monitor.norms_every_steps, run.config.optim, run.world)

    def __call__(self, state: TrainState, batches: StepBatches, num_targets: int, fed_hash: int) -> Launched:
        """Forward and backward passes and the update of the step at `state`."""
        run, config, engine = self._run, self._run.config, self._run.engine
        batch_size = config.batch_size_at(state.step)
        with run.monitor.clock("train"):
            losses, added, lr = [], [], lr_at(config.optim, state.step, config.max_steps)
            for i, (batch, inputs) in enumerate(self._feed(batches.micro_batches)):
                run.watchdog.beat(state.step)
                seed_dropout(config, state.step, batch)
                with run.watchdog.forward():
                    micro_loss = engine.model(*inputs) / num_targets  # never a mean of means
                terms = {name: term / num_targets for name, term in engine.module.loss_terms().items()}
                engine.backward(micro_loss, last=i == len(batches.micro_batches) - 1)
                losses.append(terms.pop("loss", micro_loss.detach()))  # without what only training adds
                added.append(terms)
            self._norms.before(engine, state.step)
            result = engine.launch_step(lr, config.optim.max_grad_norm)
            norms = self._norms.after(engine, result, config.optim.max_grad_norm)
            names = tuple(added[0])
            rows = [
                torch.stack(losses).double(),
                result,
                *(torch.stack([part[name] for part in added]).double() for name in names),
            ]
            record = self._records.send(torch.cat(rows))
        after = state.advance(batch_size, num_targets)
        kind = name_of(losses[0].dtype)
        return Launched(state, after, batch_size, fed_hash, lr, kind, len(losses), names, record, norms)


class Judge:
    """Reads what a step has computed, and keeps the books: ledger, guard, metrics. All ranks judge the same numbers."""

    def __init__(self, run: Run, ledger: LedgerWriter | None) -> None:
        self._run, self._ledger, self._checked = run, ledger, False

    def __call__(self, step: Launched) -> str:
        """What is wrong with the step, "" if it may stand."""
        run, monitor, engine = self._run, self._run.monitor, self._run.engine
        with monitor.clock("train"):
            rows = step.record.read()
        number, done = step.before.step, step.after.step
        grad_norm, applied = rows[run.world.rank][step.micro_batches : step.micro_batches + 2]
        engine.count_update(bool(applied))
        if self._ledger is not None:
            self._ledger.write(entry_of(step.before, step.batch_size, step.fed_hash, run.attempt))
        loss = _total(rows, 0, step.micro_batches)
        run.world.stop.remember()  # from here on there is an update to save
        planned = run.guard.enter(number, regime_at(run, step.before))
        if planned:
            monitor.log("planned", number, change=planned)
        problem = run.guard.look(loss, grad_norm)
        if problem:
            return problem
        run.watchdog.beat(done)
        if not self._checked and applied:
            found = engine.formats | {"loss": step.loss_format}
            check_formats(declared_formats(run.config.precision, run.config.engine), found)
            self._checked = True
        if not applied:
            monitor.log("skip", done, reason="non-finite gradients: the update was not applied")
        if monitor.due(done):
            starts = range(step.micro_batches + 2, len(rows[0]), step.micro_batches)
            terms = {name: _total(rows, start, step.micro_batches) for name, start in zip(step.terms, starts, strict=True)}
            facts = {"lr": step.lr, "grad_norm": grad_norm, "tokens": step.after.tokens, **run.watchdog.ranks()}
            monitor.log("train", done, loss=loss, **terms, **facts)
        if step.norms is not None:
            monitor.log("norms", done, layers=step.norms)
        return ""


def _total(rows: Sequence[Sequence[float]], start: int, count: int) -> float:
    """The sum of all ranks' numbers from `start` on, rounded once: the same bits for every order and layout."""
    return math.fsum(value for row in rows for value in row[start : start + count])


def stops_early(run: Run) -> bool:
    """Whether best_by has not become better for early_stop_evaluations; all ranks call it together."""
    config = run.config
    patience = config.early_stop_evaluations
    if patience == 0:
        return False
    used = run.world.rank == 0 and used_up(evaluated_losses(config.run_dir, config.best_by), patience)
    return run.world.broadcast(used)


def due_at(config: TrainConfig, step: int) -> tuple[str, ...]:
    """What is done after this step besides saving, in order."""
    evaluates = due(config.evaluate_every_steps, step) or step == config.max_steps
    scores = config.score.asks and (due(config.score.every_steps, step) or step == config.max_steps)
    return ("evaluate",) * evaluates + ("score",) * scores + ("sample",) * due(config.sample_every_steps, step)


def left_by_a_stop(run: Run, state: TrainState) -> tuple[str, ...]:
    """What an earlier start of this run was stopped in at this step."""
    rows = read_metrics(run.config.run_dir).all_rows if run.world.rank == 0 else ()
    return run.world.broadcast(interrupted_at([row for row in rows if row["incarnation"] < run.attempt], state.step))


def evaluate_and_sample(
    run: Run, state: TrainState, kinds: Sequence[str], saved_step: int
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Do `kinds` in order; (the evaluation's score, the kinds that a stop signal has cut short or left out).

    Where an evaluation fails, by a damaged shard say, this step is saved before that ends the run.
    """
    score = None
    for number, kind in enumerate(kinds):
        try:
            if kind == "evaluate":
                score = evaluate(run, state)
                if score is not None and saved_step == state.step:
                    keep_score(run, state, score)
            elif kind == "score":
                score_by_tasks(run, state, is_saved=saved_step == state.step)
            else:
                sample(run, state)
        except Stopped:
            return score, tuple(kinds[number:])
        except (UserError, Failure):
            if state.step != saved_step:
                save(run, state)
            with run.monitor.clock("save"):
                run.saver.close()
            raise
    return score, ()


def regime_at(run: Run, state: TrainState) -> dict[str, Any]:
    """What the loss of the step at `state` depends on by plan; the guard does not take a change of it for a fault."""
    batch_size = run.config.batch_size_at(state.step)
    last_sample = sample_indices(state, batch_size)[-1]
    phase = sum(change.from_sample <= last_sample for change in run.config.data.weight_changes)
    return {**run.settings, "data.weight_changes": phase, "batch_size": batch_size}


def digest_settings(config: TrainConfig, data: Data) -> dict[str, str]:
    """A short digest of each setting that a resume may change and the loss depends on."""
    values = config.model_dump(mode="json", include={"model", "optim", "max_steps", "precision", "float8"})
    values |= {"data": data.fingerprint}
    return {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8] for name, value in values.items()}


def due(every_steps: int, step: int) -> bool:
    """Whether something done every `every_steps` (0 = never) is done after this step."""
    return every_steps > 0 and step % every_steps == 0


def seed_dropout(config: TrainConfig, step: int, batch: MicroBatch) -> None:
    """Dropout depends on the seed, the step and the micro-batch's samples, not on which rank computes it."""
    if config.model.dropout > 0 or (config.tune.lora is not None and config.tune.lora.dropout > 0):
        torch.manual_seed(mix(config.seed, step, batch.first_sample) & HASH_MASK)


def restore_or_start(run: Run) -> TrainState:
    """The state of the newest good checkpoint, loaded into the engine, or fresh weights; says what it passed over."""
    state, restored = load_newest(run, run.config.resume_step)
    precision = declared_formats(run.config.precision, run.config.engine)
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
        draw_weights(engine, config.model, config.seed, world.progress, config.tune)
        if config.init_from is not None:
            path, _ = checkpoint.newest_good(config.init_from, world)
            if path is None:
                raise UserError(f"init_from={config.init_from}: there is no checkpoint in it")
            rows = preflight.check_initial(config, run.data, checkpoint.read_state(path), path)
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
        preflight.record_mixture(config, world, run.attempt, state)
    return state, restored


def evaluate(run: Run, state: TrainState) -> dict[str, Any] | None:
    """Validation loss per source and over all, logged; None without validation data. Raises as evaluate.evaluate does."""
    config = run.config
    if not run.data.validation:
        return None
    with run.monitor.clock("evaluate"):
        found = evaluate_sources(
            run.engine.model,
            run.engine.module,
            run.data.validation,
            run.data.tokenizer,
            run.world,
            micro_batch_size=config.micro_batch_size,
            max_samples=config.evaluate_max_samples,
            document_mask=config.data.document_mask,
        )
    score = {**combine(found.values()).summary(), "sources": {name: part.summary() for name, part in found.items()}}
    run.monitor.log("evaluate", state.step, **score)
    return score


def keep_score(run: Run, state: TrainState, score: dict[str, Any]) -> None:
    """Put the score beside this step's checkpoint, once that is committed."""
    config = run.config
    path = config.run_dir / "checkpoints" / f"step_{state.step:08d}"
    measured = validation_set(
        run.data.validation, max_samples=config.evaluate_max_samples, document_mask=config.data.document_mask
    )

    def keep() -> None:
        if still_owner(config.run_dir, run.attempt):
            best_by = "loss" if config.best_by == "loss" else None
            scores.keep_score(path, state.step, measured, score, best_by=best_by)

    run.saver.then(keep)


def score_by_tasks(run: Run, state: TrainState, *, is_saved: bool) -> None:
    """Scores of tasks, harness and exercises, logged; where this step has a checkpoint, kept beside it and in evaluations/."""
    config, questions, engine = run.config, run.questions, run.engine
    if questions is None:
        return
    parts = (engine.model, config.model, run.data.tokenizer)
    with run.monitor.clock("evaluate"), evaluation_mode(engine.module):
        found = score_model(*parts, questions, run.world, micro_batch_size=config.micro_batch_size)
    numbers = numbers_of(found)
    run.monitor.log("score", state.step, scores=numbers)
    best_by = None if config.best_by == "loss" else config.best_by
    if best_by is not None:
        scores.score_of(numbers, best_by)
    path = config.run_dir / "checkpoints" / f"step_{state.step:08d}"

    def keep() -> None:
        if not still_owner(config.run_dir, run.attempt):
            return
        scores.keep_score(path, state.step, questions.digest, {"scores": numbers}, best_by=best_by)
        try:
            measured = {"checkpoint": sha256_file(path / "manifest.json"), "questions": questions.digest}
            kept = {"step": state.step, "sources": {}, **found, "measured": measured}
            kept |= {"config": config.score.model_dump(mode="json")}
            keep_result(config.run_dir / "evaluations" / f"step_{state.step:08d}.json", kept)
        except OSError as error:
            log.warning("the scores of step %d are in metrics.jsonl only: %s", state.step, error)

    if is_saved and state.step > 0:
        run.saver.then(keep)


def sample(run: Run, state: TrainState) -> None:
    """Generated text in the log. Every rank takes part, with equally many forwards: the weights may be spread over them."""
    config, tokenizer = run.config, run.data.tokenizer
    sampling = SamplingConfig(max_tokens=config.sample_tokens, seed=config.seed)
    with run.monitor.clock("generate"), evaluation_mode(run.engine.module):
        ids = torch.tensor([prompt_ids(tokenizer, config.sample_prompt)], device=run.world.device)
        steps = generate_ids(run.engine.model, config.model, ids, sampling, vocab_size=tokenizer.vocab_size)
        decoder, text = StreamDecoder(tokenizer, at_start=not config.sample_prompt), ""
        for tokens in steps:
            run.world.agree()
            run.world.progress()
            text += "".join(decoder.push(token) for token in tokens if token is not None)
        text += decoder.finish()
    run.monitor.log("sample", state.step, prompt=config.sample_prompt, text=text)


def save(run: Run, state: TrainState, score: dict[str, Any] | None = None) -> None:
    """Begin a checkpoint of this step; once it is committed delete old ones, and keep its score if it has one already."""
    config = run.config
    info = {
        "config": config.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        **record_of(run.data),
        "guard": run.guard.to_json(),
        **({"base": dict(run.base)} if config.tune.freezes else {}),
    }

    def tidy(path: Path) -> None:
        try:
            keep = {"keep_last": config.keep_last, "keep_every_steps": config.keep_every_steps}
            checkpoint.prune(config.run_dir, **keep, in_use=run.exports.in_use())
        except OSError as error:  # somebody else deletes there, or has a file open on a network disk: the next save tries again
            log.warning("not all old checkpoints could be deleted: %s", error)

    with run.monitor.clock("save"):
        run.saver.save(run.engine, state, info, after=tidy)
    run.monitor.log("save", state.step, background=config.save_in_background)
    run.exports.after(run.saver, state.step)
    if score is not None:
        keep_score(run, state, score)


def stop_mark(owned: Ownership) -> Path:
    """The file by which a rank that ends at once tells the others of its attempt."""
    return owned.run_dir / "starts" / f"{owned.attempt:04d}.stopped"


def last_words(owned: Ownership, monitor: Monitor, reason: str) -> None:
    """Record a stop request that came before the first update: in metrics.jsonl (rank 0), and for the other ranks."""
    stop_mark(owned).touch()
    step = max((checkpoint.step_of(path) for path in checkpoint.list_checkpoints(owned.run_dir)), default=0)
    monitor.log_from_a_thread("stop", step, reason=reason)
    owned.close()  # the next start need not watch a heartbeat that has ended


def open_monitor(config: TrainConfig, world: World, attempt: int) -> Monitor:
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
