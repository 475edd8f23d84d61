"""The whole model on one page: a decoder-only transformer of the Llama or the GPT-2 family, written for one device.

Sharding, precision and compilation are applied from outside (engine/). Shape letters, used as suffixes of tensor names:
B sequences, T tokens, V vocabulary, D hidden size, H query heads, K key/value heads, E head size, N = B * T.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megagpt.config import Config
from megagpt.documents import IGNORE, check_classes
from megagpt.model.attention import Mask, attend, attention_mask
from megagpt.model.cache import Cache, KeyValues, ragged_mask
from megagpt.model.context_parallel import ContextParallel, GroupMask, attend_in_group
from megagpt.model.loss import summed_loss_terms
from megagpt.model.positions import document_positions
from megagpt.model.rope import RopeScaling, rope_table, rotate


class ModelConfig(Config):
    """Sizes of a GPT. `family` fixes the block: llama = RMSNorm, rotary positions, SwiGLU, no biases but with qkv_bias
    (arXiv 2302.13971); gpt2 = LayerNorm, learned positions, GELU, biases (Radford et al. 2019)."""

    family: Literal["llama", "gpt2"] = "llama"
    """Which block: llama (RMSNorm, RoPE, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU, biases)."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding: at least the tokenizer's vocabulary; a multiple of 64 is faster on GPUs."""
    seq_len: int = Field(gt=0)
    """Longest sequence, in tokens."""
    num_layers: int = Field(gt=0)
    """Number of blocks."""
    num_heads: int = Field(gt=0)
    """Query heads per block; hidden_size is a multiple of it unless head_size is given."""
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads (grouped-query attention, arXiv 2305.13245); null = num_heads."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    head_size: int | None = Field(default=None, gt=0)
    """Width of one head; null = hidden_size / num_heads. In Qwen3 all heads together are wider than the stream."""
    mlp_size: int | None = Field(default=None, gt=0)
    """Inner width of the MLP; null = 4 x hidden_size (gpt2), or 8/3 x hidden_size rounded up to a multiple of 64 (llama)."""
    tied_head: bool = True
    """Whether the output head shares the token embedding's weights."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head before attention (arXiv 2302.05442)."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (llama, as in Qwen2); gpt2 has biases everywhere."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies (llama)."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary frequencies to sequences longer than a model was trained on (llama); null = as they are."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance inside the norms."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an activation: after the embedding, the attention and the MLP."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get init_std / sqrt(2 num_layers)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of logsumexp(logits)^2 in the training loss (arXiv 2204.02311); 0 = none."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of a target that is spread evenly over the vocabulary in the training loss (arXiv 1512.00567); 0 = none."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a sequence classifier: its last layer scores them instead of the vocabulary, at the last token of
    each row (rows of tokenize.supervised.classes). Empty = a language model."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        check_classes(self.classes)
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}")
        if self.family == "llama" and self.head_width % 2:
            raise ValueError(f"head size {self.head_width} is odd: rotary positions turn pairs")
        if self.family == "gpt2" and self.qkv_bias:
            raise ValueError("qkv_bias is for family=llama: gpt2 has biases everywhere")
        if self.family == "gpt2" and self.rope_scaling is not None:
            raise ValueError("rope_scaling is for family=llama: gpt2 has learned positions")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP."""
        if self.mlp_size is not None:
            return self.mlp_size
        return 4 * self.hidden_size if self.family == "gpt2" else 64 * math.ceil(self.hidden_size * 8 / 3 / 64)


class Attention(nn.Module):
    """Causal multi-head attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        out_bias = config.family == "gpt2"
        bias = out_bias or config.qkv_bias
        self.num_heads, self.kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden_size, config.num_heads * config.head_width, bias=bias)
        self.key = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.value = nn.Linear(config.hidden_size, config.kv_heads * config.head_width, bias=bias)
        self.out = nn.Linear(config.num_heads * config.head_width, config.hidden_size, bias=out_bias)
        self.query_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_btd: Tensor, rope_2te: Tensor | None, mask: Mask, cache: KeyValues | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. `mask` as megagpt.model.attention has it; None = causal. GroupMask: T / n tokens of it."""
        batch, length, _ = x_btd.shape
        q_bhte = self.query_norm(self.query(x_btd).view(batch, length, self.num_heads, self.head_size)).transpose(1, 2)
        k_bkte = self.key_norm(self.key(x_btd).view(batch, length, self.kv_heads, self.head_size)).transpose(1, 2)
        v_bkte = self.value(x_btd).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        if rope_2te is not None:
            q_bhte, k_bkte = rotate(q_bhte, rope_2te), rotate(k_bkte, rope_2te)
        if cache is not None:
            k_bkte, v_bkte = cache.extend(k_bkte, v_bkte)
        if isinstance(mask, GroupMask):
            y_bhte = attend_in_group(q_bhte, k_bkte, v_bkte, mask)
        else:
            y_bhte = attend(q_bhte, k_bkte, v_bkte, mask, dropout=self.dropout if self.training else 0.0)
        return self.out(y_bhte.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_size))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.out = nn.Linear(config.mlp_width, config.hidden_size, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.out(F.silu(self.gate(x_btd)) * self.up(x_btd))


class GeluMLP(nn.Module):
    """out(gelu(up(x))) with GPT-2's tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_width)
        self.out = nn.Linear(config.mlp_width, config.hidden_size)

    def forward(self, x_btd: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.out(F.gelu(self.up(x_btd), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    checkpoint_options: dict[str, Any] | None = None
    """Of a block that checkpoints itself; None = GPT does it, or nothing does. Inside the block a compiled graph holds the
    checkpoint, and the compiler keeps and repeats what the options say; around a compiled block no product would be kept."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = _norm_of(config)
        self.attention_norm = norm()
        self.attention = Attention(config)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(config) if config.family == "llama" else GeluMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_btd: Tensor, rope_2te: Tensor | None, mask: Mask, cache: KeyValues | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        if self.checkpoint_options is not None and self.training and cache is None:
            return checkpoint(self._run, x_btd, rope_2te, mask, None, use_reentrant=False, **self.checkpoint_options)
        return self._run(x_btd, rope_2te, mask, cache)

    def _run(self, x_btd: Tensor, rope_2te: Tensor | None, mask: Mask, cache: KeyValues | None) -> Tensor:
        x_btd = x_btd + self.dropout(self.attention(self.attention_norm(x_btd), rope_2te, mask, cache))
        return x_btd + self.dropout(self.mlp(self.mlp_norm(x_btd)))


class Head(nn.Linear):
    """Final projection onto the vocabulary, or onto classes: logits, or with targets the summed loss without ever holding the
    logits."""

    counts_confusion = False
    """Whether forwards with targets and without gradient also count `confusion` (see GPT.loss_terms)."""

    compile_loss = False
    chunk_elements: int | None = None
    """Logits made at a time; None = as many as suit the device."""
    loss_terms: Mapping[str, Tensor] = MappingProxyType({})
    """Of the last forward with targets, where it gave more than the loss: its terms, without gradient (see loss.py)."""
    token_losses: Tensor | None = None
    """Of the last forward with targets: the loss of each token, [B, T] in nats, 0 where there is no target."""

    def forward(  # type: ignore[override]
        self, x_btd: Tensor, targets: Tensor | None = None, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> Tensor:
        """x [B, T, D] -> logits [B, T, V]; with targets [B, T] the fp32 scalar sum of losses (see loss.py)."""
        if targets is None:
            return F.linear(x_btd, self.weight)
        total, self.loss_terms, token_losses = summed_loss_terms(
            x_btd.flatten(0, 1),
            self.weight,
            targets.flatten(),
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            compiled=self.compile_loss,
            chunk_elements=self.chunk_elements,
        )
        self.token_losses = token_losses.view(x_btd.shape[:2])
        if self.counts_confusion and not torch.is_grad_enabled():
            self.loss_terms = {**self.loss_terms, "confusion": confusion(F.linear(x_btd, self.weight), targets)}
        return total


def confusion(logits_btc: Tensor, targets_bt: Tensor) -> Tensor:
    """[C, C] int64: how many targets of each class (row) have which class as the likeliest (column); IGNORE counts nowhere."""
    num_classes = logits_btc.shape[-1]
    is_target = targets_bt != IGNORE
    pairs = targets_bt[is_target] * num_classes + logits_btc.argmax(dim=-1)[is_target]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class GPT(nn.Module):
    """Token ids to logits, or to the summed loss.

    `checkpoint_every` = n recomputes the activations of every n-th block in the backward pass (arXiv 1604.06174):
    1 = all blocks, 0 = none. `checkpoint_selectively` keeps the results of matrix products and attention, which are dear to
    compute, and recomputes the rest.
    """

    context_parallel: ContextParallel | None = None
    """Of a model whose ranks share samples: with targets it takes its own tokens of them, and its loss is of these."""

    def __init__(self, config: ModelConfig, *, checkpoint_every: int = 0, checkpoint_selectively: bool = False) -> None:
        super().__init__()
        self.checkpoint_options: dict[str, Any] = {"context_fn": keep_products} if checkpoint_selectively else {}
        self.are_blocks_compiled = False
        self.config, self.checkpoint_every = config, checkpoint_every
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_len, config.hidden_size) if config.family == "gpt2" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm_of(config)()
        if config.classes:
            self.score = Head(config.hidden_size, len(config.classes), bias=False)
            self.score.counts_confusion = True
            return
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        doc_lengths: Tensor | None = None,
        cache: Cache | None = None,
        first_slot: int = 0,
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] (-100 = no loss) the SUMMED loss, an fp32 scalar in nats. Of a
        classifier the logits are those of its classes, and targets are numbers of classes, given where a row is scored.

        doc_lengths [B, documents], zero-padded, each row summing to T: attention then does not cross documents, and learned
        positions count from the start of each.
        cache: filled in place; the rows of ids are then the tokens that follow those in the cache's slots first_slot,
        first_slot + 1, ..., and the logits are the last token's only, [B, 1, V].

        Raises ValueError for more tokens than seq_len, and for targets beside a cache.
        """
        if targets is not None and cache is not None:
            raise ValueError("targets beside a cache: only the last token's logits are computed")
        start, length = (cache.place(first_slot, len(ids), ids.shape[1], ids.device) if cache is not None else 0), ids.shape[1]
        if start + length > self.config.seq_len:
            raise ValueError(f"{start + length} tokens are more than seq_len={self.config.seq_len}")
        ragged_bt = cache.positions_bt if cache is not None else None
        config, blockwise, across = self.config, ids.is_cuda and not (self.training and self.config.dropout), None
        runs = [(start, length)]
        if self.context_parallel is not None and targets is not None:
            across = self.context_parallel
            runs, ids, targets = across.runs(length), across.of(ids), across.of(targets)
        x_btd = self.embedding(ids)
        rope_2te = None
        if self.positions is not None:
            if doc_lengths is not None:
                places = document_positions(doc_lengths, length)
                places = places if across is None else across.of(places)
            elif ragged_bt is not None:
                places = ragged_bt
            else:
                places = _joined([torch.arange(s, s + n, device=ids.device) for s, n in runs], dim=0)
            x_btd = x_btd + self.positions(places)
        else:
            scaled = config.head_width, config.rope_theta, config.rope_scaling
            rope_2te = _joined([rope_table(*scaled, s, n, ids.device, ragged_bt) for s, n in runs], dim=1)
        if ragged_bt is not None:
            mask: Mask | GroupMask | None = ragged_mask(ragged_bt, start + length)
        else:
            mask_of = partial(attention_mask, start) if across is None else across.mask
            mask = mask_of(length, doc_lengths, ids.device, blockwise=blockwise)
        x_btd = self.dropout(x_btd)
        for i, block in enumerate(self.blocks):
            if self._checkpoints(i) and not self.are_blocks_compiled and self.training and cache is None:
                x_btd = checkpoint(block, x_btd, rope_2te, mask, use_reentrant=False, **self.checkpoint_options)
            else:
                x_btd = block(x_btd, rope_2te, mask, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.advance(first_slot, len(ids), length)
            x_btd = x_btd[:, -1:]
        if not self.training:
            return self.last_layer(self.norm(x_btd), targets)
        return self.last_layer(self.norm(x_btd), targets, self.config.z_loss, self.config.label_smoothing)

    @property
    def last_layer(self) -> Head:
        """What makes the logits: `head`, or of a classifier `score`."""
        return self.score if self.config.classes else self.head

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block, with `options` of torch.compile; a checkpointed block then has its checkpoint in its graph."""
        self.are_blocks_compiled = self.last_layer.compile_loss = True
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if self._checkpoints(i):
                block.checkpoint_options = self.checkpoint_options
            block.compile(**options)

    def _checkpoints(self, i: int) -> bool:
        return self.checkpoint_every > 0 and i % self.checkpoint_every == 0

    def loss_terms(self) -> dict[str, Tensor]:
        """The terms of what the last forward with targets gave, summed and without gradient: `loss` in nats and what training
        adds to it (`z_loss`, `label_smoothing`), {} where it was the loss alone; under no_grad also `hits` (see loss.py), and
        of a classifier `confusion`, [C, C]: targets by class (row) and likeliest class (column)."""
        return dict(self.last_layer.loss_terms)

    def sample_losses(self) -> Tensor:
        """Of the last forward with targets: each sample's summed loss, [B] fp64 in nats, without gradient; with context
        parallelism that of this rank's tokens of it."""
        assert self.last_layer.token_losses is not None
        return self.last_layer.token_losses.double().sum(1)

    def new_cache(self, num_slots: int, max_tokens: int | None = None) -> Cache:
        """An empty cache for `forward(..., cache=)`, for that many sequences of `max_tokens` (None = seq_len) each."""
        return Cache(len(self.blocks), num_slots, self.config.seq_len if max_tokens is None else max_tokens)


def keep_products() -> Any:
    """Contexts for `checkpoint` under which the results of matrix products and attention are kept."""
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_mm.default,  # float8, compiled; in eager mode it is mm of another tensor class
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,  # documents on GPUs
    ]
    return create_selective_checkpoint_contexts(kept)


def initialise(model: GPT, seed: int, local: Callable[[str, Tensor], Tensor] | None = None) -> None:
    """Fill every parameter from a generator of its own, seeded by (seed, name): the start is the same on every layout.

    `local(name, full)` cuts the piece that the parameter holds on this rank; None when it is whole.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = initial_value(model.config, name, parameter.shape, seed)
            parameter.copy_(full if local is None else local(name, full))


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU: norms 1, biases 0, the rest normal."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    std = config.init_std / math.sqrt(2 * config.num_layers) if name.endswith("out.weight") else config.init_std
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _norm_of(config: ModelConfig) -> Callable[[], nn.Module]:
    norm = nn.RMSNorm if config.family == "llama" else nn.LayerNorm
    return partial(norm, config.hidden_size, eps=config.norm_eps)
