"""One step: the ranks agree on its samples, it is launched, and its results are judged when they have reached the host.

On a GPU the next step is launched in the meantime (`read_results`), so the device is never idle.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.data.loader import Loader, MicroBatch, StepBatches
from megagpt.data.permutation import mix
from megagpt.data.sample_hash import HASH_MASK
from megagpt.data.sample_ledger import LedgerWriter, entry_of
from megagpt.data.state import TrainState, sample_indices
from megagpt.distributed.fetch import Record, Records
from megagpt.engine.dtypes import check_formats, declared_formats, name_of
from megagpt.engine.optim import lr_at
from megagpt.model.gpt import GPT
from megagpt.train.config import TrainConfig
from megagpt.train.feed import Feed
from megagpt.train.layer_norms import LayerNorms
from megagpt.train.run import Run


@dataclass(frozen=True)
class Prepared:
    """A step to be launched: this rank's micro-batches, and what the ranks agree on (`agreed`, to be called once): targets,
    hash of the samples, how many ranks were told to stop when it was prepared, targets by source of a mixture."""

    batches: StepBatches
    agreed: Callable[[], list[int]]


def prepare(run: Run, loader: Loader, state: TrainState) -> Prepared:
    """Take the micro-batches of the step at `state` and begin to agree on it."""
    world = run.world
    with run.monitor.clock("data_wait"):
        batches = loader.step(state)  # pure in TrainState: a rewind is only another state
    stop = bool(world.stop.signal_name)
    of_samples = [world.counts * number for number in (batches.num_targets, batches.fed_hash, *batches.targets_by_source)]
    return Prepared(batches, world.begin_sum([*of_samples[:2], stop, *of_samples[2:]]))


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
    targets_by_source: tuple[int, ...]
    """Of a mixture, where the step is logged, else ()."""
    record: Record
    """Per rank: the loss of each micro-batch, the gradients' norm, whether the update was applied, then each term of each
    micro-batch; terms and losses as shares of the step's mean; then the summed loss of each source in `targets_by_source`."""
    norms: dict[str, dict[str, float]] | None
    """By layer, where they were due."""


class Launch:
    """Launches steps. With FSDP and AdamW nothing in it waits for the device, but where norms by layer are due."""

    def __init__(self, run: Run) -> None:
        self._run, self._feed, self._records = run, Feed(run.world.device), Records(run.world)
        self._norms = LayerNorms(run.config.monitor.norms_every_steps, run.config.optim, run.world)

    def __call__(
        self, state: TrainState, batches: StepBatches, num_targets: int, fed_hash: int, targets_by_source: Sequence[int] = ()
    ) -> Launched:
        """Forward and backward passes and the update of the step at `state`; losses by source where it is logged."""
        run, config, engine = self._run, self._run.config, self._run.engine
        batch_size = config.batch_size_at(state.step)
        with run.monitor.clock("train"):
            losses, added, lr = [], [], lr_at(config.optim, state.step, config.max_steps)
            is_logged = (state.step + 1) % config.monitor.log_every_steps == 0
            by_source = SourceLosses(len(targets_by_source) if is_logged else 0, run.world.device)
            for i, (batch, (*inputs, sources)) in enumerate(self._feed(batches.micro_batches)):
                run.watchdog.beat(state.step)
                seed_dropout(config, state.step, batch)
                with run.watchdog.forward():
                    micro_loss = engine.model(*inputs) / num_targets  # never a mean of means
                by_source.add(engine.module, sources)
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
                *by_source.sums,
            ]
            values, waits = torch.cat(rows), engine.collective_waits
            with waits() if waits is not None else contextlib.nullcontext():  # all ranks meet, and nothing overlaps with it
                record = self._records.send(values)
        after = state.advance(batch_size, num_targets)
        kind = name_of(losses[0].dtype)
        counts = tuple(targets_by_source) if is_logged else ()
        return Launched(state, after, batch_size, fed_hash, lr, kind, len(losses), names, counts, record, norms)


class SourceLosses:
    """Sums the losses of a step's samples by source of the mixture, on the device and in an order that is always the same."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        """num_sources 0: nothing is summed."""
        self.sums: list[Tensor] = []
        """[sources] fp64 in nats, or nothing."""
        if num_sources:
            self._numbers = torch.arange(num_sources, device=device)[:, None]
            self.sums.append(torch.zeros(num_sources, dtype=torch.float64, device=device))

    def add(self, module: GPT, sources_b: Tensor | None) -> None:
        """Add those of the last forward pass, whose samples are of `sources_b`."""
        if self.sums and sources_b is not None:
            self.sums[0] += torch.where(sources_b == self._numbers, module.sample_losses(), 0.0).sum(1)


class Judge:
    """Reads the results of a step and writes ledger, guard and metrics. All ranks judge the same numbers."""

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
        planned = run.guard.enter(number, regime_at(run.config, run.settings, step.before))
        if planned:
            monitor.log("planned", number, change=planned)
        problem = run.guard.look(loss, grad_norm)
        if problem:
            return problem
        run.watchdog.beat(done)
        if not self._checked and applied:
            found = engine.formats | {"loss": step.loss_format}
            check_formats(declared_formats(run.config.precision, run.config.engine, run.config.optim), found)
            self._checked = True
        if not applied:
            monitor.log("skip", done, reason="non-finite gradients: the update was not applied")
        if monitor.due(done):
            starts = [step.micro_batches * (i + 1) + 2 for i in range(len(step.terms) + 1)]
            terms = {name: _total(rows, start, step.micro_batches) for name, start in zip(step.terms, starts, strict=False)}
            found = [_total(rows, starts[-1] + i, 1) for i in range(len(step.targets_by_source))]
            counted = zip(run.data.train.names, found, step.targets_by_source, strict=False)
            by_source = {name: {"loss": nats / count, "targets": count} for name, nats, count in counted if count}
            sources = {"sources": by_source} if by_source else {}
            facts = {"lr": step.lr, "grad_norm": grad_norm, "tokens": step.after.tokens, **run.watchdog.ranks()}
            monitor.log("train", done, loss=loss, **terms, **facts, **sources)
        if step.norms is not None:
            monitor.log("norms", done, layers=step.norms)
        return ""


def _total(rows: Sequence[Sequence[float]], start: int, count: int) -> float:
    """The sum of all ranks' numbers from `start` on, rounded once: the same bits for every order and layout."""
    return math.fsum(value for row in rows for value in row[start : start + count])


def regime_at(config: TrainConfig, settings: Mapping[str, str], state: TrainState) -> dict[str, Any]:
    """The planned settings that the loss of the step at `state` depends on; the guard takes no change of them for a spike.

    settings: a digest of each setting that a resume may change (Run.settings).
    """
    batch_size = config.batch_size_at(state.step)
    last_sample = sample_indices(state, batch_size)[-1]
    phase = sum(change.from_sample <= last_sample for change in config.data.weight_changes)
    return {**settings, "data.weight_changes": phase, "batch_size": batch_size}


def seed_dropout(config: TrainConfig, step: int, batch: MicroBatch) -> None:
    """Seed dropout by the seed, the step and the micro-batch's samples, so it does not depend on the rank that computes it."""
    if config.model.dropout > 0 or (config.tune.lora is not None and config.tune.lora.dropout > 0):
        torch.manual_seed(mix(config.seed, step, batch.first_sample) & HASH_MASK)
