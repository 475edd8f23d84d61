"""Export: a run's checkpoint becomes a folder that transformers 4.5x and 5.x, vLLM and lm-eval load.

Weights go from the checkpoint to safetensors slice by slice. The folder is kept only if every tensor on disk has the sha256 of
its source and the model that transformers loads from it gives our logits; a large model is compared module by module.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megagpt.checkpoint.base_weights import read_model
from megagpt.checkpoint.load_model import find_checkpoint, refuse_classifier
from megagpt.checkpoint.on_disk import read_state
from megagpt.checkpoint.partitions import index_of
from megagpt.checkpoint.scores import validation_loss
from megagpt.checkpoint.tokenizers import tokenizer_of
from megagpt.config import Config, UserError
from megagpt.convert.compare_logits import STREAMED, Comparison, compare_models, import_transformers, open_reference
from megagpt.convert.families import Family, Planned, architecture_of, family_for, plan_tensors
from megagpt.convert.import_hf import describe_comparison, new_folder
from megagpt.convert.model_card import model_card
from megagpt.convert.peft_adapter import write_adapter
from megagpt.convert.streamed import streamed_gpt, streamed_reference
from megagpt.convert.tokenizers import export_tokenizer
from megagpt.convert.weight_files import DTYPES, SLICE_ELEMENTS, Parameters, check_weights_written, write_index, write_weights
from megagpt.distributed.world import World, lone_world, utc_now
from megagpt.engine.build import whole_shapes
from megagpt.evaluate.results import measured_checkpoint, read_results
from megagpt.files import sha256_file, write_json, write_text
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.settings_record import read_settings
from megagpt.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)


class ExportConfig(Config):
    """Write a run's model in the format of another program."""

    run_dir: Path
    """The run whose checkpoint is exported."""
    output_dir: Path
    """The new folder."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    adapter_only: bool = False
    """Write only the adapters of a run with tune.lora, in peft's format."""
    base_model: str = ""
    """adapter_only: what adapter_config.json calls the model below them: its name, or the folder of its export."""
    format: Literal["transformers", "onnx", "aotinductor", "llama2c", "gguf"] = "transformers"
    """transformers (also for vLLM and lm-eval), onnx (a graph with key/value cache, for onnxruntime), aotinductor (compiled for
    this machine's CPU, opened by torch alone), llama2c (model.bin for github.com/karpathy/llama2.c), gguf (model.gguf for
    llama.cpp)."""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """The type of the weights on disk; bf16 and fp16 (gguf only) round the fp32 weights of the checkpoint. null = bf16, and
    fp32 of the formats that have no other (all but transformers and gguf)."""
    shard_bytes: int = Field(default=5_000_000_000, gt=0)
    """Largest weight file; a single tensor that is larger has a file of its own."""
    gate_memory_bytes: int = Field(default=16_000_000_000, ge=0)
    """Most memory for both models in fp32 while their logits are compared. Of a larger model one module's weights are in memory
    at a time, and fewer positions are compared (transformers)."""


def export_model(config: ExportConfig, world: World | None = None) -> Path:
    """Write `output_dir`; returns it. Raises UserError if the run, the step or the family do not fit, CheckpointError if the
    checkpoint is damaged, ConversionError if the export does not give the same model; output_dir then does not exist.

    All ranks of `world` call it together: each writes some of the weight files (format=transformers), rank 0 compares. The
    others return before that; output_dir is there when rank 0 returns.
    """
    world = world or lone_world(torch.device("cpu"))
    if world.size > 1 and (config.format != "transformers" or config.adapter_only):
        what = "adapter_only=true" if config.adapter_only else f"format={config.format}"
        raise UserError(
            f"{what} is written by one process, there are {world.size}: only the weights of transformers are shared"
        )
    exists = world.together(config.output_dir.exists)
    if exists:
        raise UserError(f"output_dir={config.output_dir} exists; name a new one")
    if config.format not in ("transformers", "gguf") and config.dtype in ("bf16", "fp16"):
        raise UserError(f"dtype={config.dtype}: format={config.format} is fp32")
    if config.format == "transformers" and config.dtype == "fp16":
        raise UserError("dtype=fp16: format=transformers is bf16 or fp32")
    checkpoint = world.together(lambda: find_checkpoint(config.run_dir, config.step))
    made_from = {"checkpoint": checkpoint.name, "manifest_sha256": sha256_file(checkpoint / "manifest.json")}
    world.refuse_difference(f"run_dir={config.run_dir}", made_from)
    state = read_state(checkpoint, of_model=True)
    model_config = read_settings(ModelConfig, state["model"], source=str(checkpoint / "state.json"))
    if config.format != "transformers":
        refuse_classifier(
            model_config, checkpoint, f"format={config.format} is for language models, format=transformers has classes"
        )
    if config.adapter_only:
        if config.format != "transformers":
            raise UserError(f"format={config.format} with adapter_only=true: adapters are written in peft's format only")
        with new_folder(config.output_dir) as folder:
            write_adapter(checkpoint, folder, config.base_model)
        return config.output_dir
    tokenizer = tokenizer_of(config.run_dir, state.get("tokenizer_sha256"))
    if config.format == "transformers":
        return _export_transformers(config, world, checkpoint, state, model_config, tokenizer)
    from megagpt.convert.export_graph import write_graph_export
    from megagpt.convert.gguf_file import write_gguf_export

    parameters = Parameters(checkpoint, index_of(checkpoint), whole_shapes(model_config))
    lineage = read_lineage(config.run_dir, checkpoint, state, tokenizer)
    with new_folder(config.output_dir) as folder:
        if config.format == "gguf":
            if state.get("base"):
                parameters.hold(read_model(checkpoint, model_config))
            write_gguf_export(folder, parameters, model_config, tokenizer, config.run_dir, lineage, config.dtype or "bf16")
        else:
            write_graph_export(config.format, folder, parameters, model_config, tokenizer, config.run_dir, lineage)
    return config.output_dir


def _export_transformers(
    config: ExportConfig,
    world: World,
    checkpoint: Path,
    state: Mapping[str, Any],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
) -> Path:
    import_transformers()
    family, dtype = family_for(model_config), config.dtype or "bf16"
    vocab_size = min(tokenizer.vocab_size, model_config.vocab_size)
    plan = plan_tensors(family, model_config, vocab_size)
    with _shared_folder(config.output_dir, world) as folder:
        parameters = Parameters(checkpoint, index_of(checkpoint), whole_shapes(model_config))

        def write_own() -> dict[str, dict[str, Any]]:
            if state.get("base"):  # it holds a part of the model: adapters are merged here
                parameters.hold(read_model(checkpoint, model_config))
            part = (world.rank, world.size)
            written = write_weights(folder, plan, parameters, dtype=dtype, shard_bytes=config.shard_bytes, part=part)
            check_weights_written(folder, written)
            return written

        written = world.gather(world.together(write_own))
        if world.rank > 0:
            return config.output_dir
        tensors = {name: entry for part in written for name, entry in part.items()}
        write_index(folder, plan, tensors, dtype=dtype)
        write_config(folder, family, model_config, tokenizer, vocab_size, dtype)
        notes = export_tokenizer(tokenizer, config.run_dir / "tokenizer", folder, model_config.seq_len)
        whole = 2 * 4 * sum(shape.numel() for shape in whole_shapes(model_config).values()) <= config.gate_memory_bytes
        compared = compare_export(folder, parameters, model_config, family, plan, vocab_size, dtype, whole=whole)
        lineage = read_lineage(config.run_dir, checkpoint, state, tokenizer)
        write_text(folder / "README.md", model_card(config.output_dir.name, model_config, family, lineage, compared, dtype))
        record = _record(folder, tensors, compared, lineage, notes, dtype)
        write_json(folder / "checked.json", {**record, "weights_in_memory": "whole" if whole else "module by module"})
    log.info("exported %s: %s", checkpoint, describe_comparison(compared))
    for note in notes:
        log.info("tokenizer: %s", note)
    return config.output_dir


@contextlib.contextmanager
def _shared_folder(path: Path, world: World) -> Iterator[Path]:
    """new_folder's on rank 0, which the other ranks write into too."""
    with contextlib.ExitStack() as stack:
        made = world.together(lambda: str(stack.enter_context(new_folder(path)).absolute()) if world.rank == 0 else None)
        yield Path(world.broadcast(made))


def write_config(folder: Path, family: Family, config: ModelConfig, tokenizer: Tokenizer, vocab_size: int, dtype: str) -> None:
    """config.json, as transformers 4.x and 5.x both read it, and of a language model generation_config.json."""
    eos: int | list[int] = tokenizer.eot_id if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)
    # GPT-2's default is 50256 for both; its begin of text is its end of text.
    bos = tokenizer.eot_id if tokenizer.bos_id is None and family.model_type == "gpt2" else tokenizer.bos_id
    torch_dtype = str(DTYPES[dtype][1]).removeprefix("torch.")
    values = {
        "architectures": [architecture_of(family, config)],
        "model_type": family.model_type,
        **family.settings.write(config, vocab_size),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": torch_dtype,
        "dtype": torch_dtype,
        "use_cache": True,
    }
    if config.classes:  # transformers finds the last token of a row before the padding, which no text holds
        values |= {"id2label": {str(i): name for i, name in enumerate(config.classes)}, "pad_token_id": tokenizer.eot_id}
        values |= {
            "label2id": {name: i for i, name in enumerate(config.classes)},
            "problem_type": "single_label_classification",
        }
        write_json(folder / "config.json", values)
        return
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})


def compare_export(
    folder: Path,
    parameters: Parameters,
    config: ModelConfig,
    family: Family,
    plan: Sequence[Planned],
    vocab_size: int,
    dtype: str,
    *,
    whole: bool,
) -> Comparison:
    """The gate of an export; not `whole`: one module's weights are in memory at a time. Raises ConversionError."""
    if whole:
        ours = load_rounded(parameters, config, dtype)
        return compare_models(ours, open_reference(folder), family, plan, vocab_size)
    ours = streamed_gpt(config, lambda name: read_rounded(parameters, name, dtype))
    return compare_models(ours, streamed_reference(folder), family, plan, vocab_size, short=STREAMED, long=0)


def load_rounded(parameters: Parameters, config: ModelConfig, dtype: str) -> GPT:
    """Our model with the weights as the export has them: rounded to its type, computed in fp32."""
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_rounded(parameters, name, dtype))
    return model.eval()


def read_rounded(parameters: Parameters, name: str, dtype: str) -> Tensor:
    """A parameter in fp32, rounded to the export's type slice by slice."""
    rows, *rest = parameters.shapes[name]
    found, step = torch.empty(rows, *rest), max(1, SLICE_ELEMENTS // math.prod(rest))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        found[first : first + count] = parameters.read(name, first, count).to(DTYPES[dtype][1])
    return found


def read_lineage(run_dir: Path, checkpoint: Path, state: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint was made from, by hashes, and its scores: for the model card and checked.json."""
    sources = (state["config"].get("data") or {}).get("sources") or {}
    data = {}
    for name, source in sources.items():
        manifest = Path(source["path"]) / "train" / "manifest.json"
        data[name] = {"weight": source.get("weight"), "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None}
    evaluation = run_dir / "evaluations" / f"{checkpoint.name}.json"
    manifest_sha256 = sha256_file(checkpoint / "manifest.json")
    # Another course of the run may have had a checkpoint of the same step.
    own = [found for found in read_results(evaluation) if measured_checkpoint(found) in (None, manifest_sha256)]
    scores = (own or [{}])[-1]
    return {
        "checkpoint": checkpoint.name,
        "manifest_sha256": manifest_sha256,
        "step": state["train_state"]["step"],
        "tokens": state["train_state"]["tokens"],
        "imported_from": state.get("imported_from"),
        "data_fingerprint": state.get("data_fingerprint") or None,
        "data": data,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.fingerprint},
        "validation_loss": validation_loss(checkpoint),
        "scores": {key: scores[key] for key in ("loss", "perplexity", "bits_per_byte", "tasks") if scores.get(key)},
    }


def _record(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    compared: Comparison,
    lineage: Mapping[str, Any],
    notes: list[str],
    dtype: str,
) -> dict[str, Any]:
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    return {
        "checked_at": utc_now(),
        "transformers": import_transformers().__version__,
        "dtype": dtype,
        "logits": {**asdict(compared), "relative": compared.relative},
        "tokenizer_notes": notes,
        "source": dict(lineage),
        "files": files,
        "tensors": {name: entry["sha256"] for name, entry in tensors.items()},
    }
