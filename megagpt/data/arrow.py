"""Arrow columns to and from Python values without pandas: where pandas is installed, pyarrow imports it to check the types of
values, which takes half a second and 40 MB in every worker."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def text_column(values: Sequence[str | None]) -> Any:
    """A pyarrow.StringArray, at most 2 GiB of UTF-8; None becomes null."""
    import pyarrow as pa

    encoded = [b"" if value is None else value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{int(ends[-1])} bytes of text do not fit into one column")
    valid = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    buffers = [pa.py_buffer(valid.tobytes()), pa.py_buffer(ends.astype(np.int32).tobytes()), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def number_column(values: Sequence[int] | np.ndarray, kind: type = np.int64) -> Any:
    """A pyarrow array of 64-bit integers (`kind`: np.int64 or np.uint64)."""
    import pyarrow as pa

    data = np.asarray(values, kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(data), [None, pa.py_buffer(data.tobytes())])


def numbers_of(column: Any) -> np.ndarray:
    """The values of a column of 64-bit integers without nulls (pyarrow.ChunkedArray); not copied if it is of one chunk."""
    pieces = [
        np.frombuffer(chunk.buffers()[1], column.type.to_pandas_dtype(), len(chunk), 8 * chunk.offset)
        for chunk in column.chunks
        if len(chunk)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([np.empty(0, column.type.to_pandas_dtype()), *pieces])
