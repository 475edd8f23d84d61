"""Settings that are right one by one and wrong together: schedule against length, intervals against length, data against shape.

Combinations that make no sense are refused when a run begins; unusual ones are a warning. check=true shows both.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from megagpt.checkpoint.on_disk import list_checkpoints, saved_field, step_of
from megagpt.config import UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.open_data import Data
from megagpt.data.shards import document_offsets
from megagpt.engine.optim import OptimConfig, lr_at
from megagpt.train.config import TrainConfig

SHARDS_SEARCHED = 16
"""Shards of a source that are searched for a document as long as a sample; the first nearly always has one."""
LR_JUMP = 1.05
"""A learning rate that changes by more than this factor from one step to the next one by a resume is reported."""


def refuse_contradictions(config: TrainConfig, data: Data) -> None:
    """Raise UserError that names every combination of settings that makes no sense."""
    found = _contradictions(config, data)
    if found and not list_checkpoints(config.run_dir):  # a run that began so may end so
        raise UserError("\n  ".join(["these settings contradict each other:", *found] if len(found) > 1 else found))


def warnings_of(config: TrainConfig, data: Data) -> list[str]:
    """Combinations that are valid but seldom intended, one line each."""
    found = [*_never_due(config), *_without_effect(config, data), *_too_short_documents(config, data), *_lr_jumps(config)]
    return found + (_contradictions(config, data) if list_checkpoints(config.run_dir) else [])


def _contradictions(config: TrainConfig, data: Data) -> list[str]:
    return [*_impossible_schedules(config), *_unshuffled(config, data)]


def _impossible_schedules(config: TrainConfig) -> Iterator[str]:
    schedule, steps = config.optim.schedule, config.max_steps
    if schedule.warmup_steps >= steps:
        yield (
            f"optim.schedule.warmup_steps={schedule.warmup_steps} is not below max_steps={steps}: the run would end in its "
            "warm-up (a short trial: optim.schedule.warmup_steps=0)"
        )
    elif schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        yield (
            f"optim.schedule: warmup_steps={schedule.warmup_steps} + decay_steps={schedule.decay_steps} are more than "
            f"max_steps={steps}: the learning rate would fall in its warm-up"
        )


def _unshuffled(config: TrainConfig, data: Data) -> Iterator[str]:
    block = config.data.shuffle_block
    for dataset in data.train.datasets:
        if isinstance(dataset, TokenDataset) and 2 <= len(dataset) <= block:
            yield (
                f"{dataset.directory}: has {len(dataset)} samples, not more than data.shuffle_block={block}: they would come "
                "in the same order in every epoch (data.shuffle_block=1 shuffles every sample)"
            )


def _never_due(config: TrainConfig) -> Iterator[str]:
    intervals = {
        "evaluate_every_steps": (config.evaluate_every_steps, "the only evaluation is the one at the end"),
        "score.every_steps": (config.score.every_steps, "the only scores are those at the end"),
        "sample_every_steps": (config.sample_every_steps, "no text is generated"),
        "export_every_steps": (config.export_every_steps, "nothing is exported"),
        "monitor.log_every_steps": (config.monitor.log_every_steps, "no training loss is logged"),
        "monitor.norms_every_steps": (config.monitor.norms_every_steps, "no norms are logged"),
        "save_every_steps": (config.save_every_steps, "the only checkpoint is the one at the end"),
    }
    for name, (every, consequence) in intervals.items():
        if every > config.max_steps:
            yield f"{name}={every} is more than max_steps={config.max_steps}: {consequence}"
    if config.profile.steps is not None and config.profile.steps[0] > config.max_steps:
        yield f"profile.steps={[*config.profile.steps]} begin after max_steps={config.max_steps}: nothing is recorded"
    if config.keep_every_steps > 0:
        together = math.lcm(config.keep_every_steps, config.save_every_steps)
        if together > config.max_steps:
            yield (
                f"keep_every_steps={config.keep_every_steps} with save_every_steps={config.save_every_steps}: the first "
                f"checkpoint to be kept is that of step {together}, after max_steps={config.max_steps}"
            )
        elif together != config.keep_every_steps:
            yield (
                f"keep_every_steps={config.keep_every_steps} is not a multiple of save_every_steps={config.save_every_steps}: "
                f"checkpoints are kept every {together} steps"
            )
    if config.export_every_steps % config.save_every_steps and config.export_every_steps <= config.max_steps:
        yield (
            f"export_every_steps={config.export_every_steps} is not a multiple of save_every_steps={config.save_every_steps}: "
            f"checkpoints are exported every {math.lcm(config.export_every_steps, config.save_every_steps)} steps"
        )
    for phase in config.batch_warmup:
        if phase.until_step > config.max_steps:
            yield f"batch_warmup: until_step={phase.until_step} is more than max_steps={config.max_steps}"
    for change in config.data.weight_changes:
        if change.from_sample >= config.num_samples():
            yield f"data.weight_changes: from_sample={change.from_sample} is not below the run's {config.num_samples()} samples"


def _without_effect(config: TrainConfig, data: Data) -> Iterator[str]:
    schedule = config.optim.schedule
    if schedule.decay_steps > 0 and schedule.kind != "wsd":
        yield f"optim.schedule.decay_steps={schedule.decay_steps} has no effect with kind={schedule.kind}"
    if (config.evaluate_every_steps > 0 or config.evaluate_max_samples is not None) and not data.validation:
        yield "no source has a validation split: nothing is evaluated, and no checkpoint is the best"
    by_loss = config.best_by == "loss"
    every = config.evaluate_every_steps if by_loss else config.score.every_steps
    if config.early_stop_evaluations > 0 and every % config.save_every_steps:
        yield (
            f"{'evaluate_every_steps' if by_loss else 'score.every_steps'}={every} is not a multiple of save_every_steps="
            f"{config.save_every_steps}: the best step may have no checkpoint when early_stop_evaluations ends the run"
        )
    if config.resume_step is not None and config.resume_step > config.max_steps:
        yield f"resume_step={config.resume_step} is more than max_steps={config.max_steps}"
    if config.float8 != "none" and not config.compile:
        yield f"float8={config.float8} without compile=true: scaling takes passes of its own around products, slower than bf16"


def _too_short_documents(config: TrainConfig, data: Data) -> Iterator[str]:
    """Where attention stays inside documents, positions beyond the longest one are never trained."""
    if not config.data.document_mask:
        return
    datasets = [dataset for dataset in data.train.datasets if not (isinstance(dataset, TokenDataset) and _has_rows(dataset))]
    lengths = [_longest_document(dataset, config.data.seq_len) for dataset in datasets]
    if lengths and max(lengths) < config.data.seq_len:
        yield (
            f"data.seq_len={config.data.seq_len} is longer than every document (at most {max(lengths)} tokens) and "
            "data.document_mask=true: no attention ever spans more than that"
        )


def _has_rows(dataset: TokenDataset) -> bool:
    """Rows of fine-tuning data are as short as they are."""
    return dataset.manifest.supervised is not None


def _longest_document(dataset: Any, enough: int) -> int:
    """Tokens of the longest document in the first shards; the search ends at one of `enough` tokens."""
    longest = 0
    for shard in dataset.manifest.shards[:SHARDS_SEARCHED]:
        offsets = document_offsets(dataset.directory / f"{shard.name}.idx", np.dtype(dataset.manifest.dtype))
        longest = max(longest, int(np.diff(offsets).max(initial=0)))
        if longest >= enough:
            break
    return longest


def _lr_jumps(config: TrainConfig) -> Iterator[str]:
    """A schedule is a function of step and max_steps: with another max_steps a resume may begin elsewhere on the curve."""
    path = next(reversed(list_checkpoints(config.run_dir)), None) or config.continue_from
    before = saved_field(path, "config") if path is not None else None
    if path is None or not isinstance(before, dict):
        return
    step = step_of(path)
    try:
        old = lr_at(OptimConfig.model_validate(before["optim"]), step, int(before["max_steps"]))
    except (KeyError, TypeError, ValueError):  # what is wrong with it, the load says
        return
    new = lr_at(config.optim, step, config.max_steps)
    if step < config.max_steps and not 1 / LR_JUMP <= new / max(old, 1e-300) <= LR_JUMP:
        yield (
            f"the learning rate jumps at step {step} from {old:.3g} to {new:.3g}: max_steps={before['max_steps']} -> "
            f"{config.max_steps} or another optim changes the curve (optim.schedule.kind=wsd can be lengthened without a jump)"
        )
