"""`njit` for compiled loops: kept on disk, run without the GIL. Importing this module imports numba: do it where it is used."""

import contextlib
import sys
from collections.abc import Iterator

import numba


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let imports of a module fail, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  (what Python takes for a module that is not there)
    try:
        yield
    finally:
        del sys.modules[name]


with _hidden("scipy.linalg"):
    # It looks for scipy's BLAS, to multiply matrices. No loop here does, and scipy takes every process 0.15 s of CPU. A loop
    # that did would load it then.
    import numba.np.arraymath

njit = numba.njit(cache=True, nogil=True)
"""The decorator."""
