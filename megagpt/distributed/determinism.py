"""The switches that make torch's kernels repeat themselves bit for bit on the same layout."""

import os
from typing import Any, Literal, TypeAlias

import torch

Determinism: TypeAlias = Literal["none", "strict", "canonical"]
"""none: the fastest kernels. strict: the same bits at every start on the same layout and kind of machine. canonical: also on
every number of ranks with engine.kind=fsdp and ZeRO 1, for one micro_batch_size (megagpt.engine.canonical)."""


def make_deterministic() -> None:
    """Use only kernels that repeat themselves, from here on; call it before anything runs on a GPU.

    https://pytorch.org/docs/stable/notes/randomness.html. An operation that has no such kernel raises RuntimeError.
    """
    # cuBLAS reads it when it is first used, NCCL when the process group is made: one ring, one protocol, one order of sums.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    torch.backends.cudnn.benchmark = False
