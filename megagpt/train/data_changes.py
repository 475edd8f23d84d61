"""Changes of the data between a checkpoint and a resume: which are refused, by name, and how a changed mixture continues
without repeating samples.

Sources that are added, removed or put in another order, weights that are allowed to change, and samples of another length take
over at the next sample of the run: every source continues, by name, with what it has not given yet (state.MixtureStart).
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megagpt.checkpoint.tokenizers import tokenizer_of
from megagpt.config import UserError
from megagpt.data.mixture import given_by
from megagpt.data.open_data import Data, DataConfig
from megagpt.data.state import Cut, MixtureStart, TrainState
from megagpt.settings_record import difference, filled, read_settings
from megagpt.tokenizer.extended import extends

log = logging.getLogger(__name__)

KINDS = ("data.shards", "data.order", "data.weights", "data.seq_len")
"""What allow_change=[data] stands for: the same source's shards are others; seed or shuffle_block; the weights of what has been
drawn already; seq_len, stride, document_mask, document_end_loss. `data.tokenizer` has to be named."""

_FIELDS = {
    "data.order": ("seed", "shuffle_block"),
    "data.seq_len": ("seq_len", "stride", "document_mask", "document_end_loss"),
}


def record_of(data: Data) -> dict[str, Any]:
    """The record of the data in a checkpoint's state.json, beside the settings."""
    return {
        "data_fingerprint": data.fingerprint,
        "tokenizer_sha256": data.tokenizer.fingerprint,
        "data_manifests": data.manifests,
    }


def data_differences(config: DataConfig, data: Data, saved: Mapping[str, Any], where: Path) -> dict[str, str]:
    """By kind, the differences from a checkpoint's data that a resume needs allow_change for."""
    found = {}
    tokenizer = tokenizer_difference(data, saved, where)
    if tokenizer:
        found["data.tokenizer"] = tokenizer
    if saved["data_fingerprint"] == data.fingerprint:
        return found
    before, now = filled(DataConfig, saved["config"]["data"]), config.model_dump(mode="json")
    for kind, names in _FIELDS.items():
        text = difference({name: before[name] for name in names}, {name: now[name] for name in names})
        if text:
            found[kind] = text
    old, step = read_settings(DataConfig, saved["config"]["data"], source=str(where)), saved["train_state"]["samples"]
    same_sources = list(old.sources) == list(config.sources)
    if same_sources and _phases_before(old, step) != _phases_before(config, step):
        found["data.weights"] = difference(_weights(before), _weights(now)) or "weights"
    manifests = saved.get("data_manifests")
    others = [name for name, sha256 in data.manifests.items() if manifests and manifests.get(name, sha256) != sha256]
    if others:
        found["data.shards"] = f"other shards of {', '.join(others)}"
    elif manifests is None and same_sources and not found and _phases(old) == _phases(config):
        found["data.shards"] = difference(before, now) or "shards"
    return found


def tokenizer_difference(data: Data, saved: Mapping[str, Any], where: Path) -> str:
    """Why a checkpoint's token ids do not mean the same here, "" if they do: by the same tokenizer, or one that extends it."""
    sha256, now = saved.get("tokenizer_sha256"), data.tokenizer
    if sha256 == now.fingerprint:
        return ""
    run_dir = where.parents[1]
    try:
        before = tokenizer_of(run_dir, sha256)
    except UserError as error:
        if sha256 is None:  # release 0.1 kept no hash, and the folder is gone: nothing to compare with
            log.warning("%s: names no tokenizer, and %s: whether its token ids mean the same is not known", where, error)
            return ""
        return f"sha256 {sha256[:12]} -> {now.fingerprint[:12]}"
    if before.fingerprint == now.fingerprint:
        return ""
    if extends(now, before):
        log.info("the tokenizer extends that of %s: its %d ids mean the same, %d are new", where, before.vocab_size,
                 now.vocab_size - before.vocab_size)  # fmt: skip
        return ""
    return f"sha256 {before.fingerprint[:12]} -> {now.fingerprint[:12]}"


def vocab_size_of(saved: Mapping[str, Any], where: Path, otherwise: int) -> int:
    """Ids of a checkpoint's tokenizer; `otherwise` if it is lost, which release 0.1 could not know."""
    try:
        return tokenizer_of(where.parents[1], saved.get("tokenizer_sha256")).vocab_size
    except UserError:
        return otherwise


def advice(differences: Mapping[str, str], samples: int) -> str:
    """What an allowed change of the data costs, and how to make one of the mixture: planned, so that nothing is repeated."""
    text = ""
    if "data.order" in differences or "data.shards" in differences:
        text = " In another order, or from other shards, some samples of this epoch come twice and others never."
    if "data.weights" not in differences:
        return text
    return text + (
        f" New weights are planned with data.weight_changes=[{{from_sample: {samples}, weights: ...}}] beside the old weights: "
        "nothing is repeated"
    )


def only_length_differs(config: DataConfig, saved: Mapping[str, Any], where: Path) -> bool:
    """Whether nothing of `data.seq_len` (see KINDS) but the length differs from a checkpoint's: then no token is used twice."""
    old = read_settings(DataConfig, saved["config"]["data"], source=str(where))
    same = all(
        getattr(old, name) == getattr(config, name) for name in _FIELDS["data.seq_len"] if name not in ("seq_len", "stride")
    )
    return same and _without_overlap(old) and _without_overlap(config)


def continue_mixture(config: DataConfig, saved: Mapping[str, Any], state: TrainState, where: Path) -> TrainState:
    """The state with a new MixtureStart if the checkpoint's sources, weights or sample length are not those of the settings.

    Raises UserError if the samples are longer than the runs of tokens that the order keeps together.
    """
    old = read_settings(DataConfig, saved["config"]["data"], source=str(where))
    names, now = list(old.sources), list(config.sources)
    begin = state.samples
    recut = old.seq_len != config.seq_len and _without_overlap(old) and _without_overlap(config)
    if not recut and names == now and _phases_before(old, begin) == _phases_before(config, begin):
        return state
    earlier = state.mixture or MixtureStart(0, {}, {name: number for number, name in enumerate(names)})
    phases = _since(old, earlier.from_sample)
    given = dict(zip(names, given_by(begin, phases, [earlier.given.get(name, 0) for name in names]), strict=True))
    numbers, unused = dict(earlier.numbers), max(earlier.numbers.values()) + 1
    for name in now:
        if name not in numbers:
            numbers[name], unused = unused, unused + 1
    if names != now:
        log.warning(
            "data.sources: %s -> %s: every source continues from sample %d of the run where it was",
            ", ".join(names),
            ", ".join(now),
            begin,
        )
    given = {**earlier.given, **given}
    cuts = _recut(old, config, earlier.cuts, given) if recut and begin > 0 else earlier.cuts
    return replace(state, mixture=MixtureStart(begin, given, numbers, cuts))


def _recut(
    old: DataConfig, config: DataConfig, cuts: Mapping[str, tuple[Cut, ...]], given: Mapping[str, int]
) -> dict[str, tuple[Cut, ...]]:
    """The cuts of every source that has given samples, those that are gone too, with today's length added."""
    found = {}
    for name, samples in given.items():
        before = cuts.get(name, (Cut(0, old.seq_len, old.shuffle_block),))
        for cut in before:
            together = cut.shuffle_block * cut.seq_len
            if config.seq_len > together:
                raise UserError(
                    f"data.seq_len={config.seq_len}: source {name} was shuffled in runs of {cut.shuffle_block} x {cut.seq_len} "
                    f"tokens (data.shuffle_block x data.seq_len before): samples of at most {together} tokens can continue it"
                )
        found[name] = (*before, Cut(samples, config.seq_len, config.shuffle_block))
    log.info(
        "data.seq_len: %d -> %d: every source continues with tokens that it has not given; at most the %d samples that "
        "data.shuffle_block keeps together are left out of each until its next epoch",
        old.seq_len,
        config.seq_len,
        old.shuffle_block,
    )
    return found


def _without_overlap(config: DataConfig) -> bool:
    """Whether each sample begins where the one before it ends."""
    return config.stride is None or config.stride == config.seq_len


def _phases(config: DataConfig) -> list[tuple[int, dict[str, float]]]:
    return [(start, dict(zip(config.sources, weights, strict=True))) for start, weights in config.phases()]


def _phases_before(config: DataConfig, sample: int) -> list[tuple[int, dict[str, float]]]:
    """The weights of the samples before `sample`, and of it (a change that begins there has drawn nothing)."""
    return [phase for phase in _phases(config) if phase[0] < max(1, sample)]


def _since(config: DataConfig, sample: int) -> list[tuple[int, list[float]]]:
    """The phases from `sample` on, the first one beginning there."""
    phases = config.phases()
    in_force = [weights for start, weights in phases if start <= sample][-1]
    return [(sample, in_force), *(phase for phase in phases if phase[0] > sample)]


def _weights(section: Mapping[str, Any]) -> dict[str, Any]:
    sources = {name: {"weight": source["weight"]} for name, source in section["sources"].items()}
    return {"sources": sources, "weight_changes": section["weight_changes"]}
