"""The gate of every conversion: the logits of two models that should be the same, and where they part if they are not.

Differences are measured against the largest logit: rounding grows with it. What fails in fp32 is computed again in fp64, where
rounding vanishes and a mistake does not. Models are compared on fixed and random tokens: all positions of short sequences, then
long ones in chunks through the key/value cache; rotary tables at positions up to seq_len.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import Failure, UserError
from megagpt.convert.families import CLASSIFIER, Family, Planned
from megagpt.files import read_json
from megagpt.model.gpt import GPT
from megagpt.model.rope import rope_table

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest logit (at least 1): seen are up to 2e-6 for fp32, 1e-14 for fp64."""
SHORT, LONG, CHUNK = 256, 2048, 128
"""Positions of the sequences whose logits are all compared, of the longer one, and of its chunks."""
STREAMED = 64
"""Positions that are compared of models whose weights are read as they are used."""


class ConversionError(Failure):
    """A conversion that did not give the same model; the message says where the two part."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How close two models are."""

    largest_difference: float
    largest_logit: float
    dtype: str
    """What was computed in."""
    logits: int
    """Positions whose logits were compared."""
    positions: int
    """The last position, from 1."""
    greedy_equal: int
    """Positions at which both take the same token. At another the two likeliest are closer than twice the difference."""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest_difference / max(1.0, self.largest_logit)


def open_reference(folder: Path) -> nn.Module:
    """A model in transformers' format as transformers computes it, in fp32 on the CPU. Nothing is downloaded, no code run."""
    try:
        return (
            auto_class(folder)
            .from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False)
            .eval()
        )
    except Exception as error:  # it has a class of its own for everything that does not suit it
        raise ConversionError(f"transformers cannot load it: {' '.join(str(error).split())}") from error


def auto_class(folder: Path) -> Any:
    """transformers' class that opens the model of a folder: of a language model, or of a classifier."""
    transformers = import_transformers()
    values = read_json(folder / "config.json")
    classifies = any(str(name).endswith(CLASSIFIER) for name in values.get("architectures") or ())
    return transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM


def import_transformers() -> Any:
    """transformers, told not to look for files elsewhere. Raises UserError if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noisy in ("torchao", "torch.utils._pytree"):  # warnings of a library that transformers imports, about itself
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: conversions need megagpt[convert]") from None
    transformers.logging.disable_progress_bar()
    return transformers


def compare_models(
    ours: GPT,
    reference: nn.Module,
    family: Family,
    plan: Sequence[Planned],
    vocab_size: int,
    *,
    short: int = SHORT,
    long: int = LONG,
) -> Comparison:
    """How close `reference` (transformers' module) is to ours on ids below `vocab_size`, at the first `short` positions and up
    to `long` in chunks.

    Raises ConversionError naming the kind of tensor that most likely differs.
    """

    def theirs(ids: Tensor, positions: Tensor) -> Tensor:
        hidden = reference.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        last_layer = reference.score if ours.config.classes else reference.get_output_embeddings()  # type: ignore[operator]
        return last_layer(hidden[:, positions])  # type: ignore[operator]

    found = _compare(ours, theirs, vocab_size, short, long)
    if not found.relative <= TOLERANCE:  # NaN is not
        ours.double()
        reference.double()
        found = _compare(ours, theirs, vocab_size, short, long)
    try:
        if not found.relative <= TOLERANCE:
            raise ConversionError(f"{_text(found)}; {find_difference(ours, reference, plan, vocab_size)}")
    finally:
        ours.float()
        reference.float()
    if ours.config.family == "llama":
        _compare_rotation(ours, reference)
    return found


def compare_with(ours: GPT, logits_of: Callable[[Tensor], Tensor], vocab_size: int) -> Comparison:
    """The same for a reference that is a function of ids [B, T] to logits [B, T, V]."""
    found = _compare(ours, lambda ids, positions: logits_of(ids)[:, positions], vocab_size)
    if not found.relative <= TOLERANCE:
        raise ConversionError(_text(found))
    return found


def _text(found: Comparison) -> str:
    return (
        f"logits differ by {found.largest_difference:.3g} where the largest is {found.largest_logit:.3g} "
        f"(in {found.dtype}; at most {TOLERANCE:g} of it is rounding)"
    )


@torch.no_grad()
def _compare(
    ours: GPT, theirs: Callable[[Tensor, Tensor], Tensor], vocab_size: int, short: int = SHORT, long: int = LONG
) -> Comparison:
    """`theirs` gives the logits of ids [B, T] at some positions."""
    seq_len = ours.config.seq_len
    dtype = next(ours.parameters()).dtype
    differences, largest, logits, equal = [0.0], 0.0, 0, 0

    def add(a: Tensor, b: Tensor) -> None:
        nonlocal largest, logits, equal
        a, b = a[..., :vocab_size].flatten(0, 1).double(), b[..., :vocab_size].flatten(0, 1).double()
        differences.append(float((a - b).abs().max()))
        largest = max(largest, float(a.abs().max()), float(b.abs().max()))
        logits, equal = logits + len(a), equal + int((a.argmax(-1) == b.argmax(-1)).sum())

    ids = sample_ids(vocab_size, min(seq_len, short))
    add(ours(ids), theirs(ids, torch.arange(ids.shape[1])))
    length = max(ids.shape[1], min(seq_len, long))
    if length > short:
        ids, cache = sample_ids(vocab_size, length, seed=2)[1:], ours.new_cache(1, length)
        ends = [*range(CHUNK, length, CHUNK), length]
        lasts = [ours(ids[:, start:end], cache=cache) for start, end in pairwise([0, *ends])]
        add(torch.cat(lasts, dim=1), theirs(ids, torch.tensor(ends) - 1))
    worst = float(torch.tensor(differences).max())  # NaN wins
    return Comparison(worst, largest, str(dtype).removeprefix("torch."), logits, length, equal)


def sample_ids(vocab_size: int, length: int, seed: int = 1) -> Tensor:
    """ids [2, length]: a row that walks through the vocabulary in even steps, and one drawn at random."""
    walk = (torch.arange(length, dtype=torch.long) * max(1, vocab_size // length)) % vocab_size
    return torch.stack((walk, torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))))


def _compare_rotation(ours: GPT, reference: nn.Module) -> None:
    """Compare the rotary tables at the last positions, which no comparison of logits reaches. Raises ConversionError."""
    config = ours.config
    start = max(0, config.seq_len - 64)
    table = rope_table(
        config.head_width, config.rope_theta, config.rope_scaling, start, config.seq_len - start, torch.device("cpu")
    )
    positions = torch.arange(start, config.seq_len)[None]
    cos, sin = reference.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)  # type: ignore[union-attr,operator]
    half = config.head_width // 2
    difference = float((table - torch.stack((cos[0, :, :half], sin[0, :, :half]))).abs().max())
    if difference > 1e-6:
        raise ConversionError(
            f"rotary tables differ by {difference:.3g} at positions {start} to {config.seq_len - 1}: rope_theta or rope_scaling"
        )


@torch.no_grad()
def find_difference(ours: GPT, reference: nn.Module, plan: Sequence[Planned], vocab_size: int) -> str:
    """Which kind of tensor most likely differs: that of the first module, in order of computation, whose output does."""
    ids = sample_ids(vocab_size, min(ours.config.seq_len, 32))
    pairs = _module_pairs(plan)
    with _recording(ours, [name for _, names in pairs.values() for name in names]) as our_seen:
        ours(ids)
    with _recording(reference, list(pairs)) as their_seen:
        reference(input_ids=ids)
    before = "the tokens"
    for module, (kind, names) in pairs.items():
        if module not in their_seen or any(name not in our_seen for name in names):
            continue
        (their_input, their_output), found = their_seen[module], [our_seen[name] for name in names]
        # Of the head, an export lacks the rows that no token has.
        our_output = torch.cat([_rows(output) for _, output in found], dim=-1)[:, : _rows(their_output).shape[-1]]
        if their_input.is_floating_point() and _differ(found[0][0], their_input):
            return f"what is computed between {before} and {kind} differs: heads, rotary positions or activation"
        if _differ(our_output, _rows(their_output)):
            difference = our_output.double() - _rows(their_output).double()
            # What is added is the same for every token; what is multiplied is not.
            constant = float(difference.std(dim=0).max()) <= 1e-3 * float(difference.abs().max())
            return f"most likely {kind}.{'bias' if constant else 'weight'} differs"
        before = kind
    return "no single tensor does: the logits part behind the last of them"


def _module_pairs(plan: Sequence[Planned]) -> dict[str, tuple[str, list[str]]]:
    """Module of theirs -> (its kind, the modules of ours whose outputs together are its output), in order of computation."""
    pairs = {}
    for planned in plan:
        names = [name.rpartition(".")[0] for name in planned.ours]
        pairs.setdefault(planned.theirs.rpartition(".")[0], (planned.kind.rpartition(".")[0], names))
    return pairs


@contextmanager
def _recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open: first input and output of each named module."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(model.named_modules())

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = (inputs[0], output)

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in names if name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Tensor) -> Tensor:
    """[B, T, ...] or [T, ...] as one row per token."""
    return output.flatten(2).flatten(0, 1) if output.dim() > 2 else output


def _differ(a: Tensor, b: Tensor) -> bool:
    a, b = a.flatten().double(), b.flatten().double()
    return a.shape != b.shape or not bool((a - b).abs().max() <= 1e-4 * max(1e-3, float(b.abs().max())))
