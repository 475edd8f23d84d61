"""Checks and records before a run does any work."""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.new_rows import RESIZED, NewRows
from megagpt.checkpoint.on_disk import list_checkpoints, require_checkpoint, saved_field
from megagpt.checkpoint.tokenizers import keep_tokenizer
from megagpt.config import UserError, dump
from megagpt.data.dataset import Dataset, TokenDataset
from megagpt.data.open_data import Data, refuse_other_classes
from megagpt.data.state import TrainState
from megagpt.distributed.mesh import refuse_groups, refuse_idle_groups
from megagpt.distributed.world import World, place_from_environment, utc_now
from megagpt.engine.build import refuse_shared_samples, refuse_unsupported, whole_shapes
from megagpt.engine.config import DeepSpeedConfig
from megagpt.engine.dtypes import declared_formats
from megagpt.engine.optim import STATES, refuse_unmatched
from megagpt.files import read_json, show_bytes, write_json, write_text
from megagpt.model.float8 import refuse_float8
from megagpt.model.gpt import ModelConfig
from megagpt.monitor.config import check_monitor
from megagpt.settings_record import difference, filled, read_settings
from megagpt.train import cross_checks, data_changes
from megagpt.train.background_export import refuse_exports
from megagpt.train.code_version import git_commit, git_diff
from megagpt.train.config import TrainConfig

log = logging.getLogger(__name__)

PACKAGES = ("megagpt", "torch", "deepspeed", "numpy", "sentencepiece", "safetensors", "wandb")
"""Their versions are recorded with every start."""

FIXED_ON_RESUME = ("model", *data_changes.KINDS, "data.tokenizer", "data", "seed", "optim.kind", "micro_batch_size")
"""What a resume refuses to change unless allow_change names it; `data` stands for all of data_changes.KINDS, `micro_batch_size`
is fixed with determinism=canonical only."""


BROKEN_DROPOUT = ("2.13",)
"""Releases of torch whose compiled dropout on CUDA draws wrong masks (https://github.com/pytorch/pytorch/issues/198333)."""


def check_run(config: TrainConfig, data: Data) -> None:
    """Raise UserError unless tokenizer, model, engine, disk and run_dir fit together; log what follows from the settings."""
    canonical = config.determinism == "canonical"
    refuse_unsupported(config.engine, config.optim, config.precision, canonical=canonical)
    ranks = place_from_environment(dict(os.environ)).size
    if ranks > 1 or not config.check:  # check=true on one process may be for a run on many
        refuse_groups(ranks, config.engine.context_parallel_size)
        refuse_idle_groups(ranks, config.engine.context_parallel_size, config.batch_sizes(), config.micro_batch_size)
    refuse_shared_samples(config.engine, config.model, seq_len=config.data.seq_len, canonical=canonical)
    tokens = config.data.seq_len // config.engine.context_parallel_size
    refuse_float8(config.float8, config.model, config.precision, canonical=canonical, seq_len=tokens)
    refuse_compiled_dropout(config, torch.__version__, on_gpu=torch.cuda.is_available())
    check_monitor(config.monitor)
    if config.export_every_steps:
        refuse_exports(config.model)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is less than the {data.vocab_size} of the shards' tokenizer "
            f"({', '.join(str(source.path) for source in config.data.sources.values())})"
        )
    for dataset in (*data.train.datasets, *data.validation.values()):
        if isinstance(dataset, TokenDataset):
            refuse_other_classes(dataset, config.model.classes)
    for name in config.allow_change:
        if name not in FIXED_ON_RESUME:
            raise UserError(f"allow_change={name!r}: one of {', '.join(FIXED_ON_RESUME)} is expected")
    if config.continue_from is not None and not list_checkpoints(config.run_dir):
        require_checkpoint(config.continue_from)
    refuse_longer_context(config)
    for path in list_checkpoints(config.run_dir)[:1]:
        try:
            oldest = read_json(path / "state.json")
        except UserError:  # a damaged checkpoint, which the start passes over
            oldest = {}
        refuse_imported(oldest, path)
    cross_checks.refuse_contradictions(config, data)
    parameters = sum(shape.numel() for shape in whole_shapes(config.model, config.tune).values())
    shapes = whole_shapes(config.model, config.tune, trained_only=True)
    refuse_unmatched(config.optim, shapes)
    trained = sum(shape.numel() for shape in shapes.values())
    checkpoint_bytes = 4 * trained * (1 + len(STATES[config.optim.kind]))
    _check_disk(config, checkpoint_bytes, export_bytes(config, parameters))
    tokens = config.global_batch_size * config.data.seq_len
    formats = declared_formats(config.precision, config.engine, config.optim)
    if place_from_environment(dict(os.environ)).rank == 0:
        if "data" in config.allow_change:
            log.warning("allow_change=[data] stands for %s: name what is meant", ", ".join(data_changes.KINDS))
        for warning in (*filter(None, map(packing_warning, data.train.datasets)), *cross_checks.warnings_of(config, data)):
            log.warning("%s", warning)
        log.info(
            "model: %s parameters; checkpoint: %.2f GB; step: %s tokens; run: %s tokens, %.2f epochs of %s samples",
            f"{parameters:,}",
            checkpoint_bytes / 1e9,
            f"{tokens:,}",
            f"{config.num_samples() * config.data.seq_len:,}",
            config.num_samples() / len(data.train),
            f"{len(data.train):,}",
        )
        if config.tune.freezes:
            log.info("tune: %s of %s parameters are trained", f"{trained:,}", f"{parameters:,}")
        if config.compile and isinstance(config.engine, DeepSpeedConfig) and config.engine.zero_stage == 3:
            log.warning("compile=true with zero_stage=3: DeepSpeed's hooks cut every block's graph; engine.kind=fsdp has none")
        if config.float8 != "none":
            formats["products in blocks"] = f"float8 {config.float8}"
            if not torch.cuda.is_available():
                log.warning("float8=%s on a CPU is emulated: the rounding is that of a GPU, the speed is not", config.float8)
        log.info("precision: %s", ", ".join(f"{key} {name}" for key, name in formats.items()))


def refuse_compiled_dropout(config: TrainConfig, torch_version: str, *, on_gpu: bool) -> None:
    """Raise UserError where compiled blocks would drop out wrongly; a machine without a GPU warns that one would refuse."""
    release = ".".join(torch_version.split(".")[:2])
    lora = config.tune.lora
    settings = {"model.dropout": config.model.dropout, "tune.lora.dropout": 0.0 if lora is None else lora.dropout}
    dropouts = {name: value for name, value in settings.items() if value > 0}
    if not config.compile or not dropouts or release not in BROKEN_DROPOUT:
        return
    named = ", ".join(f"{name}={value}" for name, value in dropouts.items())
    message = (
        f"compile=true with dropout ({named}): torch {torch_version} compiles it to wrong masks on CUDA (pytorch issue "
        f"198333); set compile=false or {'=0, '.join(dropouts)}=0"
    )
    if on_gpu:
        raise UserError(message)
    log.warning("a GPU would refuse: %s", message)


def packing_warning(dataset: Dataset) -> str | None:
    """What to say if a dataset's documents were placed for samples of another length than it is read in."""
    packed = dataset.manifest.pack_seq_len if isinstance(dataset, TokenDataset) else None
    if packed is None or not isinstance(dataset, TokenDataset) or (dataset.seq_len, dataset.stride) == (packed, packed):
        return None
    return (
        f"{dataset.directory}: its documents were placed for samples of {packed} tokens (tokenize.pack_seq_len); "
        f"data.seq_len={dataset.seq_len} with a stride of {dataset.stride} cuts them anywhere"
    )


def check_resume(config: TrainConfig, data: Data, saved: dict[str, Any], where: Path) -> None:
    """Raise UserError if a checkpoint belongs to another model, data or seed; log every other setting that differs."""
    refuse_imported(saved, where)
    before, now = filled(TrainConfig, saved["config"]), config.model_dump(mode="json")
    differences = {
        "model": difference(before["model"], now["model"]),
        "seed": difference(before["seed"], now["seed"]),
        "optim.kind": difference(before["optim"]["kind"], now["optim"]["kind"]),
        **data_changes.data_differences(config.data, data, saved, where),
    }
    if config.continue_from == where:  # a run that begins with another's checkpoint may plan for longer samples
        planned = _longer_samples(config, saved, where)
        differences = {name: text for name, text in differences.items() if name not in planned}
    if config.determinism == "canonical":  # another size is another order of sums
        differences["micro_batch_size"] = difference(before["micro_batch_size"], now["micro_batch_size"])
    allowed = {*config.allow_change, *(data_changes.KINDS if "data" in config.allow_change else ())}
    refused = [f"{name} ({text})" for name, text in differences.items() if text and name not in allowed]
    if refused:
        to_allow = [name for name, text in differences.items() if text and name != "data.weights"]
        raise UserError(
            f"{where}: was made with other settings: {'; '.join(refused)}. Use another run_dir"
            + (f", or allow it with allow_change=[{', '.join(to_allow)}]." if to_allow else ".")
            + data_changes.advice(differences, saved["train_state"]["samples"])
        )
    tuned = difference(before["tune"], now["tune"])
    if tuned:
        raise UserError(
            f"{where}: tune ({tuned}): the checkpoint holds other weights than would be trained; use another run_dir"
        )
    check_weights(config, saved, where)
    changed = difference(before, now)
    if changed:
        log.info("settings changed since the checkpoint: %s", changed)


def _longer_samples(config: TrainConfig, saved: dict[str, Any], where: Path) -> set[str]:
    """Of data.seq_len and model, those that differ by the length of samples and how positions are stretched alone."""
    found = {"data.seq_len"} if data_changes.only_length_differs(config.data, saved, where) else set()
    before = read_settings(ModelConfig, saved["model"], source=str(where / "state.json"))
    positions = {name: getattr(config.model, name) for name in ("seq_len", "rope_theta", "rope_scaling")}
    return found | ({"model"} if before.model_copy(update=positions) == config.model else set())


def refuse_longer_context(config: TrainConfig) -> None:
    """Raise UserError if a new run has longer samples than the one it begins with, and the same rotary positions."""
    path = config.continue_from
    if config.init_from is not None:
        path = next(reversed(list_checkpoints(config.init_from)), None)
    model, before = config.model, saved_field(path, "model") if path is not None else None
    if path is None or not isinstance(before, dict) or list_checkpoints(config.run_dir) or model.family != "llama":
        return
    old = read_settings(ModelConfig, before, source=str(path / "state.json"))
    settings = saved_field(path, "config")
    data = settings.get("data") if isinstance(settings, dict) else None
    trained = int(data["seq_len"]) if isinstance(data, dict) and "seq_len" in data else old.seq_len  # none of an imported model
    longer = config.data.seq_len > trained and (old.rope_scaling, old.rope_theta) == (model.rope_scaling, model.rope_theta)
    if longer and not {"data", "data.seq_len"} & {*config.allow_change}:
        scaling = f"{{kind: yarn, factor: {-(-config.data.seq_len // trained)}, original_seq_len: {trained}}}"
        raise UserError(
            f"data.seq_len={config.data.seq_len}: {path} was trained with {trained} tokens and the same rotary positions; "
            f"stretch them: model.rope_scaling={scaling} (or llama3), or a larger "
            f"model.rope_theta than {model.rope_theta:g}; allow_change=[data.seq_len] takes them as they are"
        )


def check_initial(config: TrainConfig, data: Data, saved: dict[str, Any], where: Path) -> NewRows | None:
    """Raise UserError if weights to begin with (init_from) are another model's, or were trained with another tokenizer. Returns
    which rows are new where the tokenizer of the data extends that one, or the vocabulary is padded otherwise."""
    if saved.get("base"):
        raise UserError(
            f"{where}: holds only what was trained beside {saved['base']['path']}: merge it into a run of its own first "
            f"(tools/inspect_checkpoints.py run_dir={where.parents[1]} merge=true output_dir=...)"
        )
    tokenizer = data_changes.tokenizer_difference(data, saved, where)
    other = read_settings(ModelConfig, saved["model"], source=str(where / "state.json"))
    first = other.vocab_size if tokenizer else data_changes.vocab_size_of(saved, where, data.vocab_size)
    grown = (first, other.vocab_size) != (data.vocab_size, config.model.vocab_size) and not tokenizer
    rows = NewRows(first, other.hidden_size) if grown else None
    if other.classes and other.classes != config.model.classes:
        raise UserError(
            f"{where}: is a classifier of {list(other.classes)}, and model.classes={list(config.model.classes)}: "
            "init_from takes a language model, or a classifier of the same classes in the same order"
        )
    as_before = other.model_copy(update={"classes": config.model.classes})  # without a head, one begins as it is drawn
    check_weights(config, saved, where, resized=() if rows is None else RESIZED, other=as_before)
    if tokenizer and "data.tokenizer" not in config.allow_change:
        raise UserError(
            f"{where}: was trained with another tokenizer ({tokenizer}): its token ids mean something else here; "
            "allow_change=[data.tokenizer] takes the weights all the same"
        )
    if rows is not None:
        log.info(
            "init_from: %d ids are as in %s, the rows of ids %d to %d begin at the mean of theirs", first, where, first,
            config.model.vocab_size - 1,
        )  # fmt: skip
    return rows


def refuse_imported(saved: dict[str, Any], where: Path) -> None:
    """Raise UserError if a checkpoint is an imported model, which has no optimizer states and no place in any data."""
    if saved.get("origin") == "import":
        raise UserError(
            f"{where}: is an imported model and no run to resume: start from it with init_from={where.parent.parent} "
            f"and another run_dir"
        )


def check_weights(
    config: TrainConfig,
    saved: dict[str, Any],
    where: Path,
    *,
    resized: Sequence[str] = (),
    other: ModelConfig | None = None,
) -> None:
    """Raise UserError if a checkpoint's weights do not mean the same in this model: other shapes, or other heads in them.
    `other`: the model that the weights are of, if not the one in `saved`.

    `resized` parameters may have another number of rows. Partitions are read by their offset in the flattened parameters: a
    larger matrix would fill a smaller one without an error.
    """
    other = other or read_settings(ModelConfig, saved["model"], source=str(where / "state.json"))
    differences = [
        f"{name}: {getattr(other, name)} -> {getattr(config.model, name)}"
        for name in ("family", "num_heads", "kv_heads")
        if getattr(other, name) != getattr(config.model, name)
    ]
    before, now = whole_shapes(other), whole_shapes(config.model)
    differences += [
        f"{name}: {[*before.get(name, ())]} -> {[*now.get(name, ())]}"
        for name in sorted({**before, **now})
        if before.get(name, ())[name in resized :] != now.get(name, ())[name in resized :]
    ]
    if differences:
        raise UserError(f"{where}: holds the weights of another model: {'; '.join(differences[:4])}")


def record_settings(config: TrainConfig, data: Data, world: World) -> None:
    """Write settings and tokenizer into run_dir (rank 0); only of a start that no checkpoint has refused."""
    if world.rank != 0:
        return
    write_text(config.run_dir / "config.yaml", dump(config))
    keep_tokenizer(config.run_dir, data.tokenizer)


def record_mixture(config: TrainConfig, world: World, attempt: int, state: TrainState) -> None:
    """Add the mixture that a start continues with to its record in run_dir/starts (rank 0): the ledger is checked by it."""
    path = config.run_dir / "starts" / f"{attempt:04d}.json"
    if world.rank == 0 and state.mixture is not None:
        write_json(path, {**read_json(path), "mixture": state.mixture.to_json()})


def record_start(config: TrainConfig, data: Data, world: World, attempt: int) -> None:
    """Write what this start was made from into run_dir/starts (rank 0): settings, git commit and changes, versions, layout."""
    if world.rank != 0:
        return
    diff, diff_path = git_diff(), config.run_dir / "starts" / f"{attempt:04d}.diff"
    if diff:
        write_text(diff_path, diff)
    record = {
        "incarnation": attempt,
        "time": utc_now(),
        "host": os.uname().nodename,
        "launcher": world.launcher,
        "world_size": world.size,
        "device": str(world.device),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "git_diff": diff_path.name if diff else None,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "data_fingerprint": data.fingerprint,
        "config": config.model_dump(mode="json"),
    }
    write_json(config.run_dir / "starts" / f"{attempt:04d}.json", record)


def _version(package: str) -> str | None:
    """The installed version; None for what is not installed (deepspeed, say, which engine fsdp does not need)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def export_bytes(config: TrainConfig, parameters: int) -> int:
    """Bytes of all exports that lie on the disk at once, bf16 weights: those that are kept, and the one being written."""
    return 2 * parameters * (config.export_keep_last + 1) if config.export_every_steps else 0


def _check_disk(config: TrainConfig, checkpoint_bytes: int, exports: int) -> None:
    """There must be room for the checkpoints that are kept, the best, and the one being written, and for `exports` bytes."""
    run_dir, keep_last = config.run_dir, config.keep_last
    existing = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir={run_dir}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir={run_dir}: {existing} is not writable")
    have = sum(file.stat().st_size for file in run_dir.glob("checkpoints/*/pieces_*"))
    exported = sum(file.stat().st_size for file in run_dir.glob("exports/*/*.safetensors"))
    needed = max(0, checkpoint_bytes * (keep_last + 2) - have) + max(0, exports - exported)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"run_dir={run_dir}: {show_bytes(free)} are free on its disk, {keep_last + 2} checkpoints (keep_last={keep_last}, "
            f"the best, and one being written)"
            + (f" and exports (export_keep_last={config.export_keep_last}, and one being written)" if exports else "")
            + f" need {show_bytes(needed)} more"
        )
