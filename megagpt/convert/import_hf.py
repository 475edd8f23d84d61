"""Import: a model of transformers, or of llama2.c, becomes a run directory that evaluates, generates, and starts other runs.

The checkpoint is written tensor by tensor, opened again, and kept only if it gives the logits of what it was made from.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import FORMAT
from megagpt.checkpoint.partitions import SLICE_BYTES, safetensors_header, write_slices
from megagpt.checkpoint.save_load import seal
from megagpt.config import Config, UserError, validate
from megagpt.convert.compare_logits import Comparison, ConversionError, compare_models, import_transformers, open_reference
from megagpt.convert.families import CLASSIFIER, Family, Planned, architecture_of, family_of, plan_tensors, split
from megagpt.convert.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, base_model_of, read_deltas, with_deltas
from megagpt.convert.tokenizers import import_tokenizer
from megagpt.convert.weight_files import WeightFolder
from megagpt.data.state import TrainState
from megagpt.distributed.world import utc_now
from megagpt.engine.build import whole_shapes
from megagpt.files import read_json, sha256_file, write_json, write_text
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)

PART_BYTES = 4 << 30
"""A checkpoint's files are about this large at most, so that several readers can check them at once."""


class ImportConfig(Config):
    """Make a run directory from a model that was trained elsewhere."""

    source: Path
    """A folder in Hugging Face's format (config.json, safetensors, tokenizer files), or a llama2.c model (.bin)."""
    run_dir: Path
    """The new run directory."""
    tokenizer: Path | None = None
    """Its tokenizer, where it is not in the source folder: a file or folder as tools/tokenize_documents.py takes it, or
    llama2.c's tokenizer.bin."""
    adapter: Path | None = None
    """A LoRA adapter in peft's format (adapter_config.json, adapter_model.safetensors) to merge into the weights."""
    seq_len: int | None = Field(default=None, gt=0)
    """Longest sequence of the imported model, in tokens; null = the source's. Shorter where attention has a sliding window."""


def import_model(config: ImportConfig) -> Path:
    """Write `run_dir` with a checkpoint of step 0, without optimizer states; returns the checkpoint's path.

    Raises UserError naming what cannot be converted and why, ConversionError if the result does not give the same logits;
    run_dir then does not exist.
    """
    if config.run_dir.exists():
        raise UserError(f"run_dir={config.run_dir} exists; name a new one")
    if config.source.is_dir():
        return _import_folder(config)
    if config.source.is_file():
        if config.adapter is not None:
            raise UserError(
                f"adapter={config.adapter}: peft's adapters are for models of transformers, not for {config.source}"
            )
        from megagpt.convert.llama2c import import_llama2c

        with new_folder(config.run_dir) as folder:
            import_llama2c(config.source, config.tokenizer, folder)
        return config.run_dir / "checkpoints" / "step_00000000"
    raise UserError(f"source={config.source}: no such file or folder")


def _import_folder(config: ImportConfig) -> Path:
    import_transformers()
    family, model_config, weights, plan = read_source(config.source, config.seq_len)
    deltas, weights.replaced = ({}, {}) if config.adapter is None else read_deltas(config.adapter)
    if config.adapter is not None and Path(base_model_of(config.adapter)).name not in ("", config.source.resolve().name):
        log.warning(
            "adapter=%s: was trained on %s, and is merged into %s: weights of equal sizes do not tell them apart",
            config.adapter, base_model_of(config.adapter), config.source,
        )  # fmt: skip
    conv1d = {planned.theirs for planned in plan if planned.transposed}
    for name, delta in {**deltas, **weights.replaced}.items():
        shape = weights.tensors[name].shape if name in weights.tensors else None
        if shape != (delta.shape[::-1] if name in conv1d else delta.shape):
            if shape is None and name in weights.replaced:
                raise UserError(
                    f"adapter={config.adapter}: is a classifier's, and {config.source} is a language model: save it as a "
                    "classifier first (transformers' AutoModelForSequenceClassification, with the names of the classes)"
                )
            found = (
                "none of the model's weights" if shape is None else f"made for {list(delta.shape)}, here it is {list(shape)}"
            )
            raise UserError(f"adapter={config.adapter}: {name}: {found}")
    weights.deltas = {name: delta.t() if name in conv1d else delta for name, delta in deltas.items()}
    with new_folder(config.run_dir) as folder:
        tokenizer = import_tokenizer(config.source, config.tokenizer, folder / "tokenizer")
        check_vocabulary(tokenizer, model_config, config.source)
        checkpoint = write_import(
            folder,
            model_config,
            tokenizer,
            source_tensors(plan, weights, whole_shapes(model_config)),
            [planned.ours for planned in plan],
            {"format": architecture_of(family, model_config), "files": _sums(config)},
        )
        compared = compare_models(
            load_model(folder, classifier=True).model,
            with_deltas(open_reference(config.source), weights.deltas, weights.replaced),
            family,
            plan,
            min(tokenizer.vocab_size, model_config.vocab_size),
        )
        record_comparison(folder, compared)
    log.info("imported %s: %s", config.source, describe_comparison(compared))
    return config.run_dir / checkpoint.relative_to(folder)


def read_source(source: Path, seq_len: int | None) -> tuple[Family, ModelConfig, WeightFolder, list[Planned]]:
    """What a folder of transformers' holds. Raises UserError unless every tensor has its place, and no other is there."""
    values = read_json(source / "config.json")
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{source / 'config.json'}: model_type: a text is expected")
    family = family_of(values["model_type"])
    model_config = family.settings.read(values, seq_len)
    if any(str(name).endswith(CLASSIFIER) for name in values.get("architectures") or ()):
        model_config = validate(
            ModelConfig, {**model_config.model_dump(), "classes": _classes_of(values)}, source=str(source / "config.json")
        )
    weights = WeightFolder(source)
    plan = plan_tensors(family, model_config)
    _add_prefix(weights, family)
    for name in list(weights.tensors):
        if name.endswith(family.ignored):
            del weights.tensors[name]
    expected = {planned.theirs: planned.shape for planned in plan}
    if model_config.tied_head and "lm_head.weight" in weights.tensors:
        if not torch.equal(weights.read("lm_head.weight"), weights.read(plan[0].theirs)):
            raise UserError(f"{source}: tie_word_embeddings=true, but lm_head.weight differs from {plan[0].theirs}")
        del weights.tensors["lm_head.weight"]
    for name in sorted(expected.keys() - weights.tensors.keys()):
        raise UserError(f"{source}: {name} is missing")
    for name in sorted(weights.tensors.keys() - expected.keys()):
        raise UserError(f"{source}: {name} has no place in a {family.model_type} with this config.json")
    for name, shape in expected.items():
        found = weights.tensors[name].shape
        if found != shape:
            raise UserError(f"{source}: {name} has shape {list(found)}, config.json makes it {list(shape)}")
    return family, model_config, weights, plan


def _classes_of(values: Mapping[str, Any]) -> list[str]:
    """Names of a classifier's classes, in order. Raises UserError unless id2label numbers them from 0."""
    labels = values.get("id2label")
    wanted = [str(i) for i in range(len(labels))] if isinstance(labels, dict) else []
    if not isinstance(labels, dict) or sorted(labels) != sorted(wanted):
        raise UserError(f"config.json: id2label={labels!r}: names by numbers from 0 are expected")
    return [str(labels[number]) for number in wanted]


def source_tensors(
    plan: Sequence[Planned], weights: WeightFolder, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """(our name, values in fp32) of every parameter, in the plan's order."""
    rows = {name: shape[0] for name, shape in shapes.items()}
    for planned in plan:
        yield from split(planned, weights.read(planned.theirs).float(), rows).items()


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: Path) -> None:
    """Raise UserError if the tokenizer gives ids that the embedding does not have."""
    used = 1 + max(i for i, piece in enumerate(tokenizer.token_bytes()) if piece or i in tokenizer.eos_ids)
    if used > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has {used} ids, the model's embedding {config.vocab_size} rows")


def write_import(
    folder: Path,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Iterator[tuple[str, Tensor]],
    groups: Sequence[tuple[str, ...]],
    origin: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of step 0 into a run directory; `tensors` come in the order of `groups`, which stay together."""
    checkpoint = folder / "checkpoints" / "step_00000000"
    checkpoint.mkdir(parents=True)
    sizes = {name: shape.numel() for name, shape in whole_shapes(model_config).items()}
    parts: list[list[str]] = [[]]
    for names in groups:
        if parts[-1] and 4 * sum(sizes[name] for name in [*parts[-1], *names]) > PART_BYTES:
            parts.append([])
        parts[-1] += names
    files = {}
    for number, names in enumerate(parts):
        keys = [f"param.{name}" for name in names]
        header = safetensors_header(
            {key: ("F32", (sizes[name],)) for key, name in zip(keys, names, strict=True)}, dict.fromkeys(keys, "0")
        )
        file = checkpoint / f"pieces_{number:05d}.safetensors"
        size, digest = write_slices(file, _slices(header, names, tensors))
        files[file.name] = {"size": size, "sha256": digest}
    state = {
        "format": FORMAT,
        "train_state": TrainState().to_json(),
        "updates": 0,
        "origin": "import",
        "imported_from": {**origin},
        "config": {},
        "model": model_config.model_dump(mode="json"),
        "data_fingerprint": "",
        "tokenizer_sha256": tokenizer.fingerprint,
        "saved_at": utc_now(),
    }
    write_json(checkpoint / "state.json", state)
    seal(checkpoint, files)
    settings = model_config.model_dump(mode="json", exclude_defaults=True)
    write_text(
        folder / "model.yaml", "# The section `model` of a run that starts from this one by init_from.\n" + _yaml(settings)
    )
    return checkpoint


def record_comparison(folder: Path, compared: Comparison) -> None:
    """Write what the gate found beside the checkpoint."""
    write_json(
        folder / "checked.json", {"checked_at": utc_now(), "logits": {**asdict(compared), "relative": compared.relative}}
    )


def describe_comparison(compared: Comparison) -> str:
    """One line for the log."""
    return (
        f"logits equal within {compared.largest_difference:.2g} where the largest is {compared.largest_logit:.3g} "
        f"({compared.logits} positions up to {compared.positions}, {compared.dtype}), same token at {compared.greedy_equal}"
    )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is renamed to `path` at the end; on any error nothing of it is left."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            raise UserError(f"{path} exists; name a new one")
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _slices(header: bytes, names: Sequence[str], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for name in names:
        found, tensor = next(tensors)
        if found != name:
            raise ConversionError(f"{found} was read, {name} is expected")
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(data), SLICE_BYTES):
            yield data[start : start + SLICE_BYTES]


def _add_prefix(weights: WeightFolder, family: Family) -> None:
    """Give the names of a base model, saved without its head, the prefix that they have within the whole."""
    if not any(name.startswith(family.prefix) for name in weights.tensors):
        names = [name for name in weights.tensors if name != "lm_head.weight"]
        for name in names:
            weights.rename(name, family.prefix + name)


def _sums(config: ImportConfig) -> dict[str, str]:
    """sha256 of what was imported, by file; an adapter's files by `adapter/<name>`."""
    files = sorted([config.source / "config.json", *config.source.glob("*.safetensors")])
    adapter = [] if config.adapter is None else [config.adapter / CONFIG_FILE, config.adapter / WEIGHTS_FILE]
    return {file.name: sha256_file(file) for file in files} | {f"adapter/{file.name}": sha256_file(file) for file in adapter}


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump({"model": settings}, sort_keys=False)
