"""glibc's heap on a CPU that trains: every step asks for the same large blocks again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation; whether the C library took it (glibc does, musl has no mallopt).

    By default glibc hands large freed blocks back to the kernel, which then gives every page anew, filled with zeros: tens of
    thousands of page faults per step of a small model, 3 to 9 % of its time. The process stays as large as it ever was, and
    grows a little more for blocks that fit nowhere (5 to 9 % was seen).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE) == 1 and mallopt(M_TRIM_THRESHOLD, LARGE) == 1
