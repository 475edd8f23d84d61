"""Rotary positions (arXiv 2104.09864) and the ways to extend them beyond the context length of training."""

import math
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor

from megagpt.config import Config, by_kind


class LinearScaling(Config):
    """Position interpolation (arXiv 2306.15595): all frequencies divided by `factor`."""

    kind: Literal["linear"] = "linear"
    """linear, llama3 or yarn."""
    factor: float = Field(gt=1)
    """By how much sequences get longer."""


class Llama3Scaling(Config):
    """Llama 3.1's rule (arXiv 2407.21783): slow frequencies divided, fast ones kept, those between blended."""

    kind: Literal["llama3"]
    """linear, llama3 or yarn."""
    factor: float = Field(gt=1)
    """By how much sequences get longer."""
    original_seq_len: int = Field(gt=0)
    """Longest sequence of the training before, in tokens."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this over original_seq_len are divided."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies that turn more often than this over original_seq_len are kept."""

    @model_validator(mode="after")
    def _check(self) -> "Llama3Scaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor} is not above low_freq_factor={self.low_freq_factor}")
        return self


class YarnScaling(Config):
    """YaRN (arXiv 2309.00071): a linear ramp over the frequencies' numbers, and sharper attention."""

    kind: Literal["yarn"]
    """linear, llama3 or yarn."""
    factor: float = Field(gt=1)
    """By how much sequences get longer."""
    original_seq_len: int = Field(gt=0)
    """Longest sequence of the training before, in tokens."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies that turn at least this often over original_seq_len are kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies that turn at most this often over original_seq_len are divided."""

    @model_validator(mode="after")
    def _check(self) -> "YarnScaling":
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is not above beta_slow={self.beta_slow}")
        return self


RopeScaling: TypeAlias = Annotated[
    Annotated[LinearScaling, Tag("linear")] | Annotated[Llama3Scaling, Tag("llama3")] | Annotated[YarnScaling, Tag("yarn")],
    by_kind("linear"),
]
"""How rotary frequencies are scaled; `kind` selects the method."""


def rope_table(
    head_size: int,
    theta: float,
    scaling: RopeScaling | None,
    start: int,
    length: int,
    device: torch.device,
    positions_bt: Tensor | None = None,
) -> Tensor:
    """Cosines and sines [2, T, E/2], fp32, of the positions start .. start + length (arXiv 2104.09864, eq. 15).

    With `positions_bt` [B, T] of those instead, [2, B, 1, T, E/2]: each row has its own, the same for all heads.
    """
    frequencies, sharpness = rope_frequencies(head_size, theta, scaling, device)
    if positions_bt is not None:
        angles = positions_bt[:, None, :, None].float() * frequencies
    else:
        angles = torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin())) * sharpness


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> tuple[Tensor, float]:
    """Turns per token in radians, [E/2] fp32, and what cosines and sines are multiplied by (YaRN's attention temperature).

    Every operation is in the order of Hugging Face's modeling_rope_utils.py, so the bits are the same: a difference in the
    last bit of a frequency grows with the position.
    """
    wavelengths = theta ** (torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    frequencies = 1.0 / wavelengths
    if scaling is None:
        return frequencies, 1.0
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        return _blend_as_llama3(frequencies, scaling), 1.0
    first, last = (_number_of(turns, head_size, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_size - 1)
    numbers = torch.arange(head_size // 2, device=device, dtype=torch.float32)
    kept = 1 - ((numbers - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + frequencies * kept, 0.1 * math.log(scaling.factor) + 1.0


def _blend_as_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow frequencies divided, fast ones kept, those between blended."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_seq_len
    tokens_per_turn = 2 * math.pi / frequencies
    divided = torch.where(tokens_per_turn > length / low, frequencies / scaling.factor, frequencies)
    share = (length / tokens_per_turn - low) / (high - low)
    blended = (1 - share) * divided / scaling.factor + share * divided
    between = (tokens_per_turn >= length / high) & (tokens_per_turn <= length / low)
    return torch.where(between, blended, divided)


def rotate(x_bhte: Tensor, rope_2te: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of each head, in fp32 at least; the pairing of Hugging Face's Llama."""
    cos, sin = rope_2te.unbind()
    first, second = x_bhte.to(torch.promote_types(x_bhte.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_bhte.dtype)


def _number_of(turns: float, head_size: int, theta: float, scaling: YarnScaling) -> float:
    """Which frequency (a real number) turns that often over original_seq_len."""
    return head_size * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
