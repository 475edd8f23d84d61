"""Exports that need no transformers: an ONNX graph, an AOTInductor package, a model of llama2.c; each behind the same gate.

A graph is computed and stored in fp32 and has batch, length and key/value cache as inputs of any size (step_graph.py).
"""

import importlib.metadata
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError
from megagpt.convert.import_hf import describe_comparison
from megagpt.convert.llama2c import write_llama2c
from megagpt.convert.step_graph import StepFunction, StepGPT, cache_names, compare_step, example_inputs
from megagpt.convert.tokenizers import export_tokenizer
from megagpt.convert.weight_files import Parameters
from megagpt.distributed.world import utc_now
from megagpt.evaluate.likelihood import prefix_id
from megagpt.files import sha256_file, write_json
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)

FILES = {"onnx": "model.onnx", "aotinductor": "model.pt2", "llama2c": "model.bin"}
"""Name of the model's file by format."""
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript", "torch"), "aotinductor": ("torch",), "llama2c": ()}


def write_graph_export(
    kind: str,
    folder: Path,
    parameters: Parameters,
    config: ModelConfig,
    tokenizer: Tokenizer,
    run_dir: Path,
    lineage: dict[str, Any],
) -> None:
    """Write a folder of one of FILES. Raises UserError if the format does not suit the model, ConversionError if it does not
    give the model's logits and greedy text."""
    path, vocab_size = folder / FILES[kind], min(tokenizer.vocab_size, config.vocab_size)
    model = load_model_whole(parameters, config)
    facts: dict[str, Any] = {}
    if kind == "llama2c":
        compared, notes = write_llama2c(model, tokenizer, vocab_size, folder)
    else:
        write, run = {"onnx": (write_onnx, open_onnx), "aotinductor": (write_package, open_package)}[kind]
        write(model, vocab_size, path)
        compared, greedy = compare_step(model, run(path, config), vocab_size, prefix_id(tokenizer))
        notes = export_tokenizer(tokenizer, run_dir / "tokenizer", folder, config.seq_len)
        facts = {"greedy_ids": greedy}
        write_json(folder / "graph.json", graph_facts(config, tokenizer, vocab_size))
    record = {
        "checked_at": utc_now(),
        "format": kind,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES[kind]},
        "logits": {**asdict(compared), "relative": compared.relative},
        **facts,
        "tokenizer_notes": notes,
        "source": lineage,
        "files": {file.name: sha256_file(file) for file in sorted(folder.iterdir())},
    }
    write_json(folder / "checked.json", record)
    log.info("exported to %s: %s", kind, describe_comparison(compared))
    for note in notes:
        log.info("tokenizer: %s", note)


def load_model_whole(parameters: Parameters, config: ModelConfig) -> GPT:
    """The model with its fp32 weights, in evaluation mode."""
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters.read(name))
    return model.eval()


def graph_facts(config: ModelConfig, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a program needs to run a graph: names and shapes of its inputs and outputs, special ids."""
    names = cache_names(config)
    return {
        "inputs": ["ids", *(f"past_{name}" for name in names)],
        "outputs": ["logits", *(f"present_{name}" for name in names)],
        "shapes": {
            "ids": ["batch", "length"],
            "logits": ["batch", "length", vocab_size],
            "past": ["batch", config.kv_heads, "past", config.head_width],
            "present": ["batch", config.kv_heads, "past + length", config.head_width],
        },
        "dtypes": {"ids": "int64", "others": "float32"},
        "seq_len": config.seq_len,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
    }


def write_onnx(model: GPT, vocab_size: int, path: Path) -> None:
    """Export with torch.export; weights beyond 1.5 GB go to a file beside it. Raises UserError without onnx and onnxscript."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: format=onnx needs megagpt[convert]") from None
    inputs, shapes = example_inputs(model.config)
    names = cache_names(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            StepGPT(model, vocab_size).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["ids", *(f"past_{name}" for name in names)],
            output_names=["logits", *(f"present_{name}" for name in names)],
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    onnx.checker.check_model(str(path))


def open_onnx(path: Path, config: ModelConfig) -> StepFunction:
    """A graph in onnxruntime, on the CPU. Raises ConversionError if a size that must vary is fixed in it."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed: format=onnx needs megagpt[convert]") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for entry in session.get_inputs():
        varying = (0, 1) if entry.name == "ids" else (0, 2)
        if not all(isinstance(entry.shape[i], str) for i in varying):
            raise ConversionError(f"{path}: input {entry.name} has fixed sizes: {entry.shape}")
    names = [entry.name for entry in session.get_inputs()]

    def step(ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        values = dict(zip(names, [ids.numpy(), *(part.numpy() for part in past)], strict=True))
        logits, *present = (torch.from_numpy(value) for value in session.run(None, values))
        return logits, present

    return step


def write_package(model: GPT, vocab_size: int, path: Path) -> None:
    """Compile with AOTInductor for this machine's CPU. Raises UserError without a C++ compiler."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    inputs, shapes = example_inputs(model.config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler about itself
        program = torch.export.export(StepGPT(model, vocab_size).eval(), inputs, dynamic_shapes=shapes)
        try:
            aoti_compile_and_package(program, package_path=str(path))
        except InvalidCxxCompiler as error:
            raise UserError(f"format=aotinductor needs a C++ compiler: {error}") from None


def open_package(path: Path, config: ModelConfig) -> StepFunction:
    """A compiled package. It is native code: open only what you made."""
    from torch._inductor import aoti_load_package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        run = aoti_load_package(str(path))

    def step(ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, *present = run(ids.contiguous(), *(part.contiguous() for part in past))  # it does not look at strides
        return logits, present

    return step
