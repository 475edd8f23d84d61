"""Models and tokenizers in the formats of llama2.c (github.com/karpathy/llama2.c).

The model, format v0: seven int32 (hidden, mlp, layers, heads, kv_heads, vocab, seq_len; vocab is negative if the head is not
tied), then fp32 arrays, each kind for all layers. Rotary positions turn neighbours (2i, 2i + 1); ours turn (i, i + E/2).
"""

import logging
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.checkpoint.load_model import load_model
from megagpt.config import UserError, validate
from megagpt.convert.compare_logits import Comparison, ConversionError, compare_with
from megagpt.convert.import_hf import check_vocabulary, describe_comparison, record_comparison, write_import
from megagpt.files import sha256_file
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.model.rope import rope_table
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.sentencepiece import SentencePiece
from megagpt.tokenizer.space_mark import SPACE_MARK
from megagpt.tokenizer.special_ids import write_special_ids

log = logging.getLogger(__name__)

ROW_SIZED = ("attention_norm", "query", "key", "value", "out", "mlp_norm", "gate", "down", "up")
"""The arrays of the blocks, in the file's order."""
OUR_NAMES = {
    **{name: f"attention.{name}" for name in ("query", "key", "value", "out")},
    **{"gate": "mlp.gate", "down": "mlp.out", "up": "mlp.up"},
}
"""Ours, where they differ."""


@dataclass(frozen=True)
class Llama2c:
    """A model as the file has it: views of the mapped file."""

    config: ModelConfig
    embedding: Tensor
    blocks: dict[str, Tensor]
    """By name in ROW_SIZED, each [layers, ...]."""
    norm: Tensor
    head: Tensor | None
    """None: the embedding."""


def read_llama2c(path: Path) -> Llama2c:
    """A model file. Raises UserError unless its size is exactly what its header says."""
    with path.open("rb") as file:
        header = file.read(28)
    if len(header) < 28:
        raise UserError(f"{path}: {len(header)} bytes: not a model of llama2.c")
    hidden, mlp, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", header)
    if min(hidden, mlp, layers, heads, kv_heads, abs(vocab), seq_len) < 1 or hidden % heads:
        raise UserError(f"{path}: not a model of llama2.c (format v0): its header is {struct.unpack('<7i', header)}")
    head_size, kv_size = hidden // heads, hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (abs(vocab), hidden),
        "attention_norm": (layers, hidden),
        "query": (layers, hidden, hidden),
        "key": (layers, kv_size, hidden),
        "value": (layers, kv_size, hidden),
        "out": (layers, hidden, hidden),
        "mlp_norm": (layers, hidden),
        "gate": (layers, mlp, hidden),
        "down": (layers, hidden, mlp),
        "up": (layers, mlp, hidden),
        "norm": (hidden,),
        "rotary": (2, seq_len, head_size // 2),
    }
    if vocab < 0:
        shapes["head"] = (-vocab, hidden)
    size, expected = path.stat().st_size, 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if size != expected:
        raise UserError(f"{path}: {size} bytes, a model of llama2.c with this header has {expected}")
    values = {
        "vocab_size": abs(vocab),
        "seq_len": seq_len,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": hidden,
        "mlp_size": mlp,
        "tied_head": vocab > 0,
    }
    config = validate(ModelConfig, values, source=str(path))
    numbers, found, position = torch.from_numpy(np.memmap(path, np.float32, mode="c", offset=28)), {}, 0
    for name, shape in shapes.items():
        found[name] = numbers[position : position + math.prod(shape)].view(shape)
        position += math.prod(shape)
    blocks = {name: found[name] for name in ROW_SIZED}
    return Llama2c(config, found["embedding"], blocks, found["norm"], found.get("head"))


def parameters_of(source: Llama2c) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, in order."""
    yield "embedding.weight", source.embedding
    for i in range(source.config.num_layers):
        for name in ROW_SIZED:
            weight = source.blocks[name][i]
            if name in ("query", "key"):  # per head, from rotating (2i, 2i + 1) to rotating (i, i + E/2)
                by_head = weight.view(-1, source.config.head_width // 2, 2, source.config.hidden_size)
                weight = by_head.transpose(1, 2).reshape(weight.shape)
            yield f"blocks.{i}.{OUR_NAMES.get(name, name)}.weight", weight
    yield "norm.weight", source.norm
    if source.head is not None:
        yield "head.weight", source.head


def load_llama2c(path: Path) -> GPT:
    """The model as one of ours, in evaluation mode."""
    source = read_llama2c(path)
    model = GPT(source.config)
    state = dict(parameters_of(source))
    model.load_state_dict({"head.weight": state["embedding.weight"], **state})
    return model.eval()


def llama2c_logits(source: Llama2c, ids: Tensor) -> Tensor:
    """ids [B, T] -> logits [B, T, V], computed as run.c does, from its arrays as they are: what an import is compared with."""
    config, w = source.config, source.blocks
    (batch, length), size = ids.shape, config.head_width
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    turns = torch.polar(torch.ones(length, size // 2), torch.outer(torch.arange(length, dtype=torch.float32), frequencies))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(batch, length, -1, size // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).reshape(batch, length, -1, size)

    x = source.embedding[ids]
    for i in range(config.num_layers):
        h = norm(x, w["attention_norm"][i])
        q, k, v = (h @ w[name][i].T for name in ("query", "key", "value"))
        q, k, v = turn(q), turn(k), v.view(batch, length, -1, size)
        k, v = (y.repeat_interleave(config.num_heads // config.kv_heads, dim=2) for y in (k, v))
        scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        y = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).reshape(batch, length, -1)
        x = x + y @ w["out"][i].T
        h = norm(x, w["mlp_norm"][i])
        x = x + (F.silu(h @ w["gate"][i].T) * (h @ w["up"][i].T)) @ w["down"][i].T
    return norm(x, source.norm) @ (source.embedding if source.head is None else source.head).T


def write_llama2c(model: GPT, tokenizer: Tokenizer, vocab_size: int, folder: Path) -> tuple[Comparison, list[str]]:
    """Write model.bin, and tokenizer.bin where run.c would encode as the tokenizer does; returns how close it is, and notes.

    Raises UserError if the format cannot hold the model, ConversionError if what was written gives other logits.
    """
    config, path = model.config, folder / "model.bin"
    fixed = {
        "family": "llama", "head_size": None, "qk_norm": False, "qkv_bias": False, "rope_theta": 10000.0,
        "rope_scaling": None, "norm_eps": 1e-5,
    }  # fmt: skip
    for name, value in fixed.items():
        found = getattr(config, name)
        if found != value and not (name == "head_size" and config.head_width * config.num_heads == config.hidden_size):
            raise UserError(f"format=llama2c: model.{name}={found}: run.c computes {name}={value} only")
    sizes = (config.hidden_size, config.mlp_width, config.num_layers, config.num_heads, config.kv_heads)
    state = model.state_dict()
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *sizes, vocab_size if config.tied_head else -vocab_size, config.seq_len))
        for values in _arrays(state, config, vocab_size):
            file.write(values.detach().contiguous().numpy().astype("<f4").data)
    source = read_llama2c(path)
    compared = compare_with(model, lambda ids: llama2c_logits(source, ids), vocab_size)
    data, reason = tokenizer_bin(tokenizer)
    if data is None:
        return compared, [f"tokenizer.bin is not written: {reason}"]
    (folder / "tokenizer.bin").write_bytes(data)
    return compared, []


def _arrays(state: Mapping[str, Tensor], config: ModelConfig, vocab_size: int) -> Iterator[Tensor]:
    """All arrays of a file, in its order."""
    yield state["embedding.weight"][:vocab_size]
    for name in ROW_SIZED:
        for i in range(config.num_layers):
            weight = state[f"blocks.{i}.{OUR_NAMES.get(name, name)}.weight"]
            if name in ("query", "key"):  # back from rotating (i, i + E/2) to rotating (2i, 2i + 1)
                by_head = weight.view(-1, 2, config.head_width // 2, config.hidden_size)
                weight = by_head.transpose(1, 2).reshape(weight.shape)
            yield weight
    yield state["norm.weight"]
    yield from rope_table(config.head_width, config.rope_theta, None, 0, config.seq_len, torch.device("cpu"))
    if not config.tied_head:
        yield state["head.weight"][:vocab_size]


def tokenizer_bin(tokenizer: Tokenizer) -> tuple[bytes | None, str]:
    """A tokenizer in the format of run.c; None and the reason if run.c would encode a text otherwise."""
    if not isinstance(tokenizer, SentencePiece):
        return None, f"run.c reads SentencePiece models, this is {tokenizer.kind}"
    from sentencepiece import sentencepiece_model_pb2 as protocol

    model = protocol.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tokenizer.path.read_bytes())
    kinds = protocol.ModelProto.SentencePiece.Type  # pyright: ignore[reportAttributeAccessIssue]
    expected = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    if model.trainer_spec.model_type != 2 or [piece.type for piece in model.pieces[:259]] != expected:
        return None, "run.c wants BPE with <unk>, <s>, </s> and the 256 bytes as its first pieces"
    if not tokenizer.dummy_prefix or any(piece.type != kinds.NORMAL for piece in model.pieces[259:]):
        return None, "run.c puts a space before every text and knows no user-defined pieces"
    entries = []
    for i, piece in enumerate(model.pieces):
        text = ("\n<s>\n" if i == 1 else "\n</s>\n" if i == 2 else piece.piece.replace(SPACE_MARK, " ")).encode()
        entries.append((piece.score, text))
    longest = max(len(text) for _, text in entries)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", s, len(text)) + text for s, text in entries), ""


def import_llama2c(path: Path, tokenizer_path: Path | None, folder: Path) -> None:
    """Write a model of llama2.c into a run directory. Raises UserError or ConversionError as `import_model` does."""
    if tokenizer_path is None:
        raise UserError(f"source={path}: a model of llama2.c holds no tokenizer: name it (tokenizer=tokenizer.bin)")
    source = read_llama2c(path)
    tokenizer = import_tokenizer(tokenizer_path, folder / "tokenizer")
    check_vocabulary(tokenizer, source.config, path)
    names = [(name,) for name, _ in parameters_of(source)]
    origin = {"format": "llama2.c v0", "files": {path.name: sha256_file(path)}}
    write_import(folder, source.config, tokenizer, parameters_of(source), names, origin)
    try:
        compared = compare_with(load_model(folder).model, lambda ids: llama2c_logits(source, ids), source.config.vocab_size)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    record_comparison(folder, compared)
    log.info("imported %s: %s", path, describe_comparison(compared))


def import_tokenizer(path: Path, folder: Path) -> Tokenizer:
    """llama2.c's tokenizer.bin as a SentencePiece model in `folder`, or a copy of any tokenizer that we open.

    Texts begin with BOS = 1; both it and EOS = 2 end them, as in run.c.
    """
    folder.mkdir(parents=True)
    if path.suffix == ".bin":
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(path))
    else:
        open_tokenizer(path).save(folder)
    if isinstance(open_tokenizer(folder), SentencePiece):
        write_special_ids(folder, eos_ids=[2, 1], bos_id=1)
    return open_tokenizer(folder)


def _sentencepiece_model(path: Path) -> bytes:
    """tokenizer.bin: an int32, then per token its score, its length and its bytes."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    data, position = path.read_bytes(), 4
    model = protocol.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = protocol.ModelProto.SentencePiece.Type  # pyright: ignore[reportAttributeAccessIssue]
    names = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
    while position < len(data):
        try:
            score, length = struct.unpack_from("<fi", data, position)
            text = data[position + 8 : position + 8 + length].decode("utf-8")
        except (struct.error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a tokenizer of llama2.c ({error})") from None
        if length < 0 or position + 8 + length > len(data):
            raise UserError(f"{path}: not a tokenizer of llama2.c: it ends within token {len(model.pieces)}")
        position += 8 + length
        number = len(model.pieces)
        kind = kinds.BYTE if 3 <= number < 259 else kinds.NORMAL
        name, kind = names.get(number, (text if kind == kinds.BYTE else text.replace(" ", "\u2581"), kind))
        model.pieces.add(piece=name, score=score, type=kind)
    if len(model.pieces) < 259:
        raise UserError(f"{path}: {len(model.pieces)} tokens: a tokenizer of llama2.c has 259 or more")
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()
