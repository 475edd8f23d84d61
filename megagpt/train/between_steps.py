"""Work between steps: checkpoints, evaluations, scores and samples of text, and when each is due."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint import scores
from megagpt.config import Failure, UserError
from megagpt.data.state import TrainState
from megagpt.distributed.world import Stopped
from megagpt.evaluate.loss import combine, evaluate_sources, evaluation_mode, validation_set
from megagpt.evaluate.results import keep_result
from megagpt.evaluate.scores_in_training import numbers_of, score_model
from megagpt.files import sha256_file
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import generate_ids
from megagpt.generate.text_stream import StreamDecoder
from megagpt.monitor.metrics import interrupted_at, read_metrics
from megagpt.tokenizer.base import prompt_ids
from megagpt.train.config import TrainConfig
from megagpt.train.data_changes import record_of
from megagpt.train.early_stop import evaluated_losses, used_up
from megagpt.train.out_of_memory import OutOfMemory, explaining_out_of_memory
from megagpt.train.run import Run

log = logging.getLogger(__name__)

NAMES = {"evaluate": "the evaluation", "score": "the scoring", "sample": "the sampling"}
"""Of what is done between steps, in messages."""


def explaining(run: Run, state: TrainState, what: str) -> AbstractContextManager[None]:
    """`explaining_out_of_memory` for `what` is done after the step at which the run is."""
    when = f"in {what} after step {state.step}"
    parts = (run.config, run.engine, run.world, state.step, run.monitor.clock, run.planner)
    return explaining_out_of_memory(*parts, attempt=run.attempt, when=when)


def due(every_steps: int, step: int) -> bool:
    """Whether something done every `every_steps` (0 = never) is done after this step."""
    return every_steps > 0 and step % every_steps == 0


def due_at(config: TrainConfig, step: int) -> tuple[str, ...]:
    """What runs after this step besides saving, in order."""
    evaluates = due(config.evaluate_every_steps, step) or step == config.max_steps
    scores = config.score.asks and (due(config.score.every_steps, step) or step == config.max_steps)
    return ("evaluate",) * evaluates + ("score",) * scores + ("sample",) * due(config.sample_every_steps, step)


def stops_early(run: Run) -> bool:
    """Whether best_by has not improved for early_stop_evaluations; all ranks call it together."""
    config = run.config
    patience = config.early_stop_evaluations
    if patience == 0:
        return False
    of_validation = config.best_by == "loss" or config.model.classes
    measured = validation_name(run) if of_validation else run.questions and run.questions.digest
    used = run.world.rank == 0 and used_up(evaluated_losses(config.run_dir, config.best_by, measured), patience)
    return run.world.broadcast(used)


def validation_name(run: Run) -> str:
    """The name of the run's validation set: losses on others are not compared with its own."""
    config = run.config
    return validation_set(run.data.validation, max_samples=config.evaluate_max_samples, document_mask=config.data.document_mask)


def left_by_a_stop(run: Run, state: TrainState) -> tuple[str, ...]:
    """The work at this step in which an earlier start of this run was stopped."""
    rows = read_metrics(run.config.run_dir).all_rows if run.world.rank == 0 else ()
    return run.world.broadcast(interrupted_at([row for row in rows if row["incarnation"] < run.attempt], state.step))


def evaluate_and_sample(
    run: Run, state: TrainState, kinds: Sequence[str], saved_step: int
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Do `kinds` in order; returns (the evaluation's score, the kinds that a stop signal cut short or skipped).

    If an evaluation fails (by a damaged shard, for example), this step is saved before the run ends. If one of several ranks
    fails by itself, they can no longer save together.
    """
    score = None
    for number, kind in enumerate(kinds):
        try:
            with explaining(run, state, NAMES[kind]):
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
        except Exception as error:
            # What the ranks have agreed on, or what the only one has met (memory that ran out, say): all can still save.
            agreed = isinstance(error, (UserError, Failure)) and not isinstance(error, OutOfMemory)
            if agreed or run.world.size == 1:
                if state.step != saved_step:
                    save(run, state)
                with run.monitor.clock("save"):
                    run.saver.close()
            raise
    return score, ()


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
            full_rows=config.compile,
        )
    total = combine(found.values())
    score: dict[str, Any] = {**total.summary(), "sources": {name: part.summary() for name, part in found.items()}}
    if config.model.classes:
        score["scores"] = total.class_scores()
    run.monitor.log("evaluate", state.step, **score, measured=validation_name(run))
    return score


def keep_score(run: Run, state: TrainState, score: dict[str, Any]) -> None:
    """Write the score beside this step's checkpoint once it is committed."""
    config = run.config
    path = config.run_dir / "checkpoints" / f"step_{state.step:08d}"
    measured = validation_name(run)

    def keep() -> None:
        best_by = config.best_by if config.best_by == "loss" or config.model.classes else None
        scores.keep_score(path, state.step, measured, score, best_by=best_by)

    run.saver.then(keep)


def score_by_tasks(run: Run, state: TrainState, *, is_saved: bool) -> None:
    """Scores of tasks, harness and exercises, logged; where this step has a checkpoint, kept beside it and in evaluations/."""
    config, questions, engine = run.config, run.questions, run.engine
    if questions is None:
        return
    parts = (engine.model, config.model, run.data.tokenizer)
    with run.monitor.clock("evaluate"), evaluation_mode(engine.module), uncompiled():
        found = score_model(*parts, questions, run.world, micro_batch_size=config.micro_batch_size)
    numbers = numbers_of(found)
    run.monitor.log("score", state.step, scores=numbers, measured=questions.digest)
    best_by = None if config.best_by == "loss" else config.best_by
    if best_by is not None:
        scores.score_of(numbers, best_by)
    path = config.run_dir / "checkpoints" / f"step_{state.step:08d}"

    def keep() -> None:
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


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks operation by operation: every length of a text would be compiled anew, up to torch's limit, beyond
    which training would not be compiled either."""
    with torch.compiler.set_stance("force_eager"):
        yield


def sample(run: Run, state: TrainState) -> None:
    """Generated text in the log. Every rank takes part, with equally many forwards: the weights may be spread over them."""
    config, tokenizer = run.config, run.data.tokenizer
    sampling = SamplingConfig(max_tokens=config.sample_tokens, seed=config.seed)
    with run.monitor.clock("generate"), evaluation_mode(run.engine.module), uncompiled():
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

    with run.monitor.clock("save"), explaining(run, state, "the save"):
        run.saver.save(run.engine, state, info, after=tidy)
    run.monitor.log("save", state.step, background=config.save_in_background)
    run.exports.after(run.saver, state.step)
    if score is not None:
        keep_score(run, state, score)
