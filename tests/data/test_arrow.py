"""Arrow columns: what pyarrow itself makes of the same values, without pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from megagpt.data.arrow import number_column, numbers_of, text_column


@pytest.mark.parametrize(
    "values", [[], [None], [""], ["a", None, "é€𝒳", "", "\0", None], [str(i) if i % 3 else None for i in range(99)]]
)
def test_texts(values: list[str | None]) -> None:
    column = text_column(values)
    column.validate(full=True)
    assert column.equals(pa.array(values, pa.string()))
    assert column.null_count == sum(value is None for value in values)


@pytest.mark.parametrize(("kind", "values"), [(np.int64, [-1, 2**62]), (np.uint64, [0, 2**64 - 1]), (np.int64, [])])
def test_numbers(kind: type, values: list[int]) -> None:
    column = number_column(values, kind)
    column.validate(full=True)
    assert column.equals(pa.array(values, pa.from_numpy_dtype(kind)))
    assert numbers_of(pa.chunked_array([column], column.type)).tolist() == values


def test_chunks_and_slices_are_read_as_they_are() -> None:
    table = pa.table({"n": number_column(range(100))})
    both = pa.concat_tables([table.slice(10, 5), table.slice(0, 0), table.slice(50, 3)])["n"]
    assert numbers_of(both).tolist() == both.to_pylist() == [10, 11, 12, 13, 14, 50, 51, 52]


def test_pandas_is_not_imported() -> None:
    pytest.importorskip("pandas")
    code = (
        "import sys, pyarrow as pa; from megagpt.data.arrow import *;"
        "table = pa.table({'a': text_column(['x', None]), 'b': number_column([1, 2])}).take(number_column([1, 0]));"
        "print(table['a'].to_pylist(), numbers_of(table['b']).tolist(), 'pandas' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, timeout=900, capture_output=True, text=True).stdout
    assert printed == "[None, 'x'] [2, 1] False\n"
