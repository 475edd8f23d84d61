"""The CPU half: dumps to documents, documents to token shards. Nothing in here imports torch."""

import os

# Nothing here uses numpy's BLAS, which starts a thread per core when loaded; a process of one thread can fork its workers.
_given = os.environ.get("OPENBLAS_NUM_THREADS")
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy  # noqa: E402, F401

if _given is None:
    del os.environ["OPENBLAS_NUM_THREADS"]
else:
    os.environ["OPENBLAS_NUM_THREADS"] = _given
