"""Bytes that one block, the embedding and the head hold in the passes, measured on tensors without memory.

The real model runs with three layers under FakeTensorMode, which computes shapes and allocates nothing, while a tracker adds up
the storages that are alive. What the middle block holds is what every block holds, so the cost does not depend on the depth.
On a GPU norms are fused kernels that a CPU does not have: there they are replaced by functions that keep what those kernels
keep (the input and fp32 statistics of each row); attention keeps the same on both (query, key, value, output, log-sum-exp).
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagpt.engine.autocast import computing_in_bf16
from megagpt.model.gpt import GPT, Attention, ModelConfig
from megagpt.model.loss import CHUNK_ELEMENTS_GPU

Kernels = Literal["cpu", "gpu"]
GRADIENT = "gradient of "
"""Prefix of the marks at which a parameter's gradient has been made."""
Gradients = Literal["kept", "taken"]
"""kept: a parameter's gradient stays in its `.grad` (fully_shard's units, stage 0); taken: a hook empties it at once (ZeRO)."""


class StorageTracker(TorchDispatchMode):
    """Adds up the bytes of all live storages that operations have touched. Use it as a context manager.

    live: bytes now. peak: the most since `start_peak`; peaks: the same by `label`, the current activity. With `fake` it
    counts only tensors without memory.
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.label = ""
        self.peaks: dict[str, int] = {}
        self._fake = fake
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs first, its local operations come here
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self.see(leaf)
        self._raise_peak()
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once."""
        if isinstance(tensor, FakeTensor) != self._fake or (tensor.device.type == "meta" and not self._fake):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        reference = self._references.get(key)
        if reference is None or reference() is not storage:  # new, maybe at the address of one that has just gone
            self._forget(key)
            self._references[key] = weakref.ref(storage, lambda gone, key=key: self._forget(key, gone))
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def start_peak(self) -> int:
        """Begin a new peak; returns the live bytes."""
        self.peak = self.live
        self.peaks.clear()
        return self.live

    def _forget(self, key: int, gone: Any = None) -> None:
        if gone is None or self._references.get(key) is gone:
            self.live -= self._sizes.pop(key, 0)
            self._references.pop(key, None)

    def _raise_peak(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peaks[self.label] = max(self.peaks.get(self.label, 0), self.live)

    def __enter__(self) -> "StorageTracker":
        resize, tracker = torch.UntypedStorage.resize_, self

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:  # fully_shard frees gathered weights like this
            result = resize(storage, size)
            if (before := tracker._sizes.get(storage._cdata)) is not None:
                tracker._sizes[storage._cdata] = storage.nbytes()
                tracker.live += storage.nbytes() - before
                tracker._raise_peak()
            return result

        self._resize = resize
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        return super().__exit__(*exception)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that a part of a pass adds to those alive at its start: the peak, and what is left at its end."""

    peak: int
    left: int


@dataclass(frozen=True, slots=True)
class Made:
    """A moment in a part of the backward pass: a parameter's gradient is made, or (no parameter) the part ends. Bytes are
    counted from the part's start: peak since the previous moment, and live now, this gradient included."""

    parameter: str
    """Its name, without the block's prefix."""
    peak: int
    live: int


@dataclass(frozen=True, slots=True)
class Activations:
    """The parts of one micro-batch's passes, in bytes; `Gradients` says whether they include gradients of parameters.

    In the backward pass a part begins when the gradient of its output is complete, and ends when that of its input is.
    """

    embedding: Span
    block: Span
    head: Span
    head_backward: Span
    block_backward: Span
    embedding_backward: Span
    made_by_head: tuple[Made, ...]
    """The moments of `head_backward`; without gradients if these are kept."""
    made_by_block: tuple[Made, ...]
    made_by_embedding: tuple[Made, ...]


@dataclass(frozen=True, slots=True)
class TraceKey:
    """Everything that the bytes of the parts depend on."""

    model: ModelConfig
    micro_batch_size: int
    seq_len: int
    dtype: Literal["fp32", "bf16"]
    checkpointing: Literal["none", "selective", "full"]
    kernels: Kernels
    gradients: Gradients
    documents: bool = False
    """Whether a mask keeps attention inside documents."""
    casts: bool = False
    """Whether fp32 weights are cast to bf16 in each forward pass (one process on a CPU)."""


@lru_cache(maxsize=256)
def trace(key: TraceKey) -> Activations:
    """Measure the parts' bytes: a second or two per key, whatever the number of layers."""
    config = key.model.model_copy(update={"num_layers": 3})
    tracker = StorageTracker(fake=True)
    marks: list[tuple[str, int, int]] = []

    def mark(name: str) -> None:
        marks.append((name, tracker.peak, tracker.start_peak()))

    with ExitStack() as stack:
        stack.enter_context(_default_dtype(torch.bfloat16 if key.dtype == "bf16" and not key.casts else torch.float32))
        stack.enter_context(FakeTensorMode())
        model = GPT(
            config,
            checkpoint_every=0 if key.checkpointing == "none" else 1,
            checkpoint_selectively=key.checkpointing == "selective",
        )
        if key.kernels == "gpu":
            _use_gpu_kernels(model)
        call: Callable[..., Tensor] = computing_in_bf16(model) if key.casts else model
        ids = torch.zeros(key.micro_batch_size, key.seq_len, dtype=torch.long)
        lengths = torch.full((key.micro_batch_size, 1), key.seq_len) if key.documents and key.kernels == "cpu" else None
        if key.gradients == "taken":
            for name, parameter in model.named_parameters():
                parameter.register_post_accumulate_grad_hook(partial(_drop_gradient, partial(mark, f"{GRADIENT}{name}")))
        _mark_parts(model, mark)
        stack.enter_context(tracker)
        for parameter in model.parameters():
            tracker.see(parameter)
        tracker.see(ids)
        mark("start")
        loss = call(ids, ids, lengths) / ids.numel()
        mark("head")
        loss.backward()
        mark("embedding_backward")
    return _activations(marks)


def _activations(marks: list[tuple[str, int, int]]) -> Activations:
    """`marks`: (name, peak bytes since the previous mark, live bytes) at the end of each part and at each gradient."""

    def moments(name: str) -> tuple[Made, ...]:
        end = next(i for i, mark in enumerate(marks) if mark[0] == name)
        begin = max(i for i in range(end) if not marks[i][0].startswith(GRADIENT))
        start, found = marks[begin][2], []
        for of, peak, live in marks[begin + 1 : end + 1]:
            parameter = of.removeprefix(GRADIENT).removeprefix("blocks.1.") if of != name else ""
            found.append(Made(parameter, peak - start, live - start))
        return tuple(found)

    def span(name: str) -> Span:
        found = moments(name)
        return Span(max(made.peak for made in found), found[-1].live)

    parts = ("embedding", "block1", "head", "head_backward", "block1_backward", "embedding_backward")
    spans: Any = (*map(span, parts), *map(moments, parts[3:]))
    return Activations(*spans)


def _mark_parts(model: GPT, mark: Callable[[str], None]) -> None:
    """Call `mark` at the end of each part of both passes: when a block is entered, and when its output's gradient exists."""
    last = len(model.blocks) - 1

    def at_entry(number: int) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: Any) -> None:
            if in_backward():
                return  # a recomputation
            mark("embedding" if number == 0 else f"block{number - 1}")
            if number == 0:
                inputs[0].register_hook(lambda gradient: mark("block0_backward"))

        return hook

    def at_exit(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            if in_backward():
                return
            name = "head_backward" if number == last else f"block{number + 1}_backward"
            output.register_hook(lambda gradient: mark(name))

        return hook

    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(at_entry(number))
        block.register_forward_hook(at_exit(number))
    model.norm.register_forward_pre_hook(lambda module, inputs: mark(f"block{last}"))


def in_backward() -> bool:
    """Whether a backward pass is running; a forward pass inside it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _drop_gradient(mark: Callable[[], None], parameter: Tensor) -> None:
    mark()
    parameter.grad = None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _use_gpu_kernels(model: GPT) -> None:
    """Make norms keep what a GPU's fused norms keep, the head make a GPU's number of logits at a time, and attention make no
    dropout mask."""
    model.last_layer.chunk_elements = CHUNK_ELEMENTS_GPU
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = _fused_norm(module.weight, None, 1)  # type: ignore[method-assign]
        elif isinstance(module, nn.LayerNorm):
            module.forward = _fused_norm(module.weight, module.bias, 2)  # type: ignore
        elif isinstance(module, Attention):
            module.dropout = 0.0


def _fused_norm(weight: Tensor, bias: Tensor | None, statistics: int) -> Callable[[Tensor], Tensor]:
    return lambda x: _FusedNorm.apply(x, weight, bias, statistics)  # type: ignore[return-value]


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, statistics: int) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((statistics, *x.shape[:-1]), dtype=torch.float32))
        ctx.has_bias = bias is not None
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None, None
