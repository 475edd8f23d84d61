"""Exports for llama.cpp: one GGUF file with weights and tokenizer, written and read back by the `gguf` library.

Matrices are F32, F16 or BF16, everything else is F32. llama.cpp's `llama` turns neighbours (2i, 2i + 1) where we turn
(i, i + E/2): rows of queries and keys are put in that order; its qwen2, qwen3 and gpt2 need nothing of the kind.
"""

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError
from megagpt.convert.families import Planned, family_for, plan_tensors
from megagpt.convert.tokenizers import export_tokenizer
from megagpt.convert.weight_files import Parameters, slices_of
from megagpt.distributed.world import utc_now
from megagpt.files import sha256_file, write_json
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import BytePairs
from megagpt.tokenizer.extended import Extended
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.reading import CL100K_PATTERN, GPT2_PATTERN, PATTERNS
from megagpt.tokenizer.sentencepiece import SentencePiece

log = logging.getLogger(__name__)

FILE = "model.gguf"
TYPES = {"fp32": ("F32", torch.float32), "fp16": ("F16", torch.float16), "bf16": ("BF16", torch.bfloat16)}
PRE_TOKENIZERS = {GPT2_PATTERN: "gpt-2", CL100K_PATTERN: "llama-bpe", PATTERNS["o200k"]: "gpt-4o"}
"""Our expression -> what llama.cpp calls the same cuts of a text."""


def import_gguf() -> Any:
    """The library. Raises UserError without it."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed: format=gguf needs megagpt[convert]") from None
    return gguf


def write_gguf_export(
    folder: Path,
    parameters: Parameters,
    config: ModelConfig,
    tokenizer: Tokenizer,
    run_dir: Path,
    lineage: Mapping[str, Any],
    dtype: str,
) -> None:
    """Write model.gguf, the tokenizer's own files and checked.json. Raises UserError if the format cannot hold the model or its
    tokenizer, ConversionError if what is read back is not what was to be written."""
    gguf = import_gguf()
    if config.rope_scaling is not None:
        raise UserError("format=gguf: model.rope_scaling is not written; format=transformers has it")
    notes = export_tokenizer(tokenizer, run_dir / "tokenizer", folder, config.seq_len)
    vocab_size = min(tokenizer.vocab_size, config.vocab_size)
    vocabulary, more = vocabulary_of(tokenizer, folder, vocab_size)
    family, path = family_for(config), folder / FILE
    tensors = planned_tensors(gguf, config, vocab_size)
    architecture = family.model_type
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(gguf, writer, config, vocab_size, dtype, folder.name)
    _add_vocabulary(writer, vocabulary, tokenizer)
    for item in tensors:
        kind = gguf.GGMLQuantizationType[_type_of(item.shape, dtype)]
        size = int(np.prod(item.shape)) * (4 if kind.name == "F32" else 2)
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in tensors:
            kind = _type_of(item.shape, dtype)
            values = item.read(parameters).numpy()
            largest = np.finfo(np.float16 if kind == "F16" else np.float32).max
            if not np.abs(values).max() <= largest:
                raise ConversionError(f"{item.name}: a weight is not finite in {dtype}: use dtype=bf16 or fp32")
            writer.write_tensor_data(np.ascontiguousarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])))
    finally:
        writer.close()
    check_written(gguf, path, tensors, parameters, vocabulary, dtype)
    record = {
        "checked_at": utc_now(),
        "format": "gguf",
        "versions": {"gguf": importlib.metadata.version("gguf")},
        "architecture": architecture,
        "dtype": dtype,
        "tensors_equal": len(tensors),
        "tokens_equal": len(vocabulary.tokens),
        "tokenizer_notes": notes + more,
        "source": dict(lineage),
        "files": {file.name: sha256_file(file) for file in sorted(folder.iterdir())},
    }
    write_json(folder / "checked.json", record)
    log.info(
        "exported to gguf (%s, %s): %d tensors and %d tokens read back equal",
        architecture,
        dtype,
        len(tensors),
        len(vocabulary.tokens),
    )
    for note in notes + more:
        log.info("tokenizer: %s", note)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its name, its shape as llama.cpp has it (rows first), and what of ours it is."""

    name: str
    shape: tuple[int, ...]
    planned: Planned
    turned_heads: int
    """Heads whose rows are put from (i, i + E/2) to (2i, 2i + 1); 0 = none."""

    def read(self, parameters: Parameters) -> Tensor:
        """The values, fp32."""
        values = torch.cat(list(slices_of(self.planned, parameters, torch.float32)))
        if self.planned.transposed:
            values = values.T
        if self.turned_heads:
            values = values.view(self.turned_heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        return values.contiguous()


def planned_tensors(gguf: Any, config: ModelConfig, vocab_size: int) -> list[GgufTensor]:
    """Every tensor of the file; names by the library's own table."""
    family = family_for(config)
    architecture = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    tensors = []
    for planned in plan_tensors(family, config, vocab_size):
        name = names.get_name(planned.theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConversionError(f"{planned.theirs}: gguf {importlib.metadata.version('gguf')} has no name for it")
        heads = {"attn_q.weight": config.num_heads, "attn_k.weight": config.kv_heads} if family.model_type == "llama" else {}
        turned = next((count for end, count in heads.items() if name.endswith(end)), 0)
        shape = tuple(reversed(planned.shape)) if planned.transposed else planned.shape
        tensors.append(GgufTensor(name, shape, planned, turned))
    return tensors


def _type_of(shape: Sequence[int], dtype: str) -> str:
    return TYPES[dtype][0] if len(shape) > 1 else "F32"


def _add_settings(gguf: Any, writer: Any, config: ModelConfig, vocab_size: int, dtype: str, name: str) -> None:
    kinds = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    if config.family == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as llama.cpp reads it."""

    model: str
    """gpt2 (byte-level BPE) or llama (SentencePiece BPE)."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool = False


def vocabulary_of(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> tuple[GgufVocabulary, list[str]]:
    """The vocabulary, from the files that `export_tokenizer` has written to `folder`, and notes.

    Raises UserError for a tokenizer that llama.cpp does not compute.
    """
    types = import_gguf().TokenType
    base = tokenizer.base if isinstance(tokenizer, Extended) else tokenizer
    if isinstance(base, SentencePiece) and not isinstance(tokenizer, Extended):
        return _of_sentencepiece(base, vocab_size), []
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = value.get("model", {})
    if model.get("type") != "BPE" or not _is_byte_level(value):
        raise UserError(f"format=gguf: the tokenizer ({tokenizer.kind}) is neither byte-level BPE nor SentencePiece's BPE")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [int(types.UNUSED)] * vocab_size
    for text, number in model["vocab"].items():
        if number < vocab_size:
            tokens[number], kinds[number] = text, int(types.NORMAL)
    for entry in value["added_tokens"]:
        if entry["id"] < vocab_size:
            tokens[entry["id"]] = entry["content"]
            kinds[entry["id"]] = int(types.CONTROL if entry["special"] else types.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pattern = GPT2_PATTERN if isinstance(base, Bytes) else base.vocabulary.pattern if isinstance(base, BytePairs) else ""
    pre = PRE_TOKENIZERS.get(pattern, "default")
    notes = (
        [] if pattern in PRE_TOKENIZERS else ["llama.cpp has no name for how texts are cut before merging: it may cut others"]
    )
    return GgufVocabulary("gpt2", pre, tokens, kinds, merges, []), notes


def _is_byte_level(value: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([value.get("pre_tokenizer"), value.get("decoder")])


def _of_sentencepiece(tokenizer: SentencePiece, vocab_size: int) -> GgufVocabulary:
    from sentencepiece import sentencepiece_model_pb2 as protocol

    model = protocol.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tokenizer.path.read_bytes())
    if model.trainer_spec.model_type != 2:
        raise UserError("format=gguf: of SentencePiece's models llama.cpp's `llama` computes BPE, this is another")
    pieces = model.pieces[:vocab_size]  # SentencePiece numbers its types as GGUF does
    types, scores = [int(piece.type) for piece in pieces], [float(piece.score) for piece in pieces]
    return GgufVocabulary("llama", "default", [piece.piece for piece in pieces], types, [], scores, tokenizer.dummy_prefix)


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_eos_token_id(tokenizer.eot_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)


def check_written(
    gguf: Any,
    path: Path,
    tensors: Sequence[GgufTensor],
    parameters: Parameters,
    vocabulary: GgufVocabulary,
    dtype: str,
) -> None:
    """Read the file and compare every tensor, bit for bit with ours rounded by torch, and the vocabulary. Raises
    ConversionError that names the first difference."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if set(found) != {item.name for item in tensors}:
        raise ConversionError(f"{path}: its tensors are {sorted(found)}")
    for item in tensors:
        tensor = found[item.name]
        expected = item.read(parameters)
        if len(item.shape) > 1:
            expected = expected.to(TYPES[dtype][1]).float()
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.shape != expected.shape or not np.array_equal(values, expected.numpy()):
            raise ConversionError(f"{path}: {item.name} is not the run's {' + '.join(item.planned.ours)}")
    for key, written in _vocabulary_fields(vocabulary):
        field = reader.get_field(key)
        if (None if field is None else field.contents()) != written:
            raise ConversionError(f"{path}: {key} is not the tokenizer's")


def _vocabulary_fields(vocabulary: GgufVocabulary) -> Iterator[tuple[str, Any]]:
    yield "tokenizer.ggml.model", vocabulary.model
    yield "tokenizer.ggml.pre", vocabulary.pre
    yield "tokenizer.ggml.tokens", vocabulary.tokens
    yield "tokenizer.ggml.token_type", vocabulary.types
    if vocabulary.merges:
        yield "tokenizer.ggml.merges", vocabulary.merges
    if vocabulary.scores:
        yield "tokenizer.ggml.scores", [float(np.float32(score)) for score in vocabulary.scores]
