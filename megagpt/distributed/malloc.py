"""Settings of glibc's malloc for training on a CPU, where every step allocates the same large blocks."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
THRESHOLDS = 1 << 30, 1 << 25
"""Blocks up to this size are kept: glibc before 2.35 takes no threshold above 32 MiB."""


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation; whether the C library took it (musl has no mallopt).

    By default glibc returns large freed blocks to the kernel, which then maps and zeroes every page again: tens of
    thousands of page faults per step of a small model, 3 to 18 % of its time. The process stays as large as it ever was, and
    grows more for blocks that fit nowhere: peaks 5 to 24 % higher were seen.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in THRESHOLDS)
    return mallopt(M_TRIM_THRESHOLD, max(THRESHOLDS)) == 1 and mapped
