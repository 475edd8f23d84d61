"""Models in the format of llama2.c (github.com/karpathy/llama2.c), as ours."""

import math
import struct
from pathlib import Path

import torch

from megagpt.model.gpt import GPT, ModelConfig


def read_llama2c(path: Path) -> GPT:
    """A model in llama2.c's v0 format: seven int32, then fp32 arrays."""
    data = path.read_bytes()
    hidden, mlp, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", data[:28])
    config = ModelConfig(
        vocab_size=vocab,
        seq_len=seq_len,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=hidden,
        mlp_size=mlp,
    )
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        position += math.prod(shape)
        return numbers[position - math.prod(shape) : position].view(shape)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        """From rotating neighbours (2i, 2i + 1) to rotating (i, i + E/2)."""
        by_head = weight.view(layers, -1, config.head_size // 2, 2, hidden)
        return by_head.transpose(2, 3).reshape(weight.shape)

    kv_size = kv_heads * config.head_size
    state = {"embedding.weight": take(vocab, hidden)}
    stacked = {"attention_norm": take(layers, hidden)}
    stacked["attention.query"] = halves(take(layers, hidden, hidden))
    stacked["attention.key"] = halves(take(layers, kv_size, hidden))
    stacked["attention.value"] = take(layers, kv_size, hidden)
    stacked["attention.out"] = take(layers, hidden, hidden)
    stacked["mlp_norm"] = take(layers, hidden)
    stacked["mlp.gate"], stacked["mlp.out"] = take(layers, mlp, hidden), take(layers, hidden, mlp)
    stacked["mlp.up"] = take(layers, mlp, hidden)
    state["norm.weight"] = take(hidden)
    state |= {f"blocks.{i}.{name}.weight": stack[i] for name, stack in stacked.items() for i in range(layers)}
    model = GPT(config)
    model.load_state_dict({**state, "head.weight": state["embedding.weight"]})
    return model.eval()
