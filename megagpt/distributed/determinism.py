"""The switches that make torch's kernels repeat themselves bit for bit on the same layout."""

import logging
import os
from typing import Any, Literal, TypeAlias

import torch

Determinism: TypeAlias = Literal["none", "strict", "canonical"]
"""none: the fastest kernels. strict: the same bits at every start on the same layout and kind of machine. canonical: also on
every number of ranks with engine.kind=fsdp and ZeRO 1, for one micro_batch_size (megagpt.engine.canonical)."""


NCCL_SETTINGS = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
"""A site profile may set others; NCCL would then choose an order of sums by message size and layout."""

log = logging.getLogger(__name__)


def make_deterministic() -> None:
    """Use only kernels that repeat themselves, from here on; call it before anything runs on a GPU.

    https://pytorch.org/docs/stable/notes/randomness.html. An operation that has no such kernel raises RuntimeError.
    """
    # cuBLAS reads it when it is first used, NCCL when the process group is made: one ring, one protocol, one order of sums.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, value in NCCL_SETTINGS.items():
        if os.environ.get(name, value) != value:
            log.warning(
                "%s=%s of the environment becomes %s: determinism needs one order of sums", name, os.environ[name], value
            )
        os.environ[name] = value
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    torch.backends.cudnn.benchmark = False


def use_tf32(wanted: bool) -> None:
    """Whether matrix products of fp32 tensors on a GPU run in TF32; without, all 24 bits of their mantissas count."""
    torch.set_float32_matmul_precision("high" if wanted else "highest")
