"""The grid of tests/soak/parity_groups.py: what is in it, and a few of its cells over a few updates."""

import math
from collections import Counter
from pathlib import Path

import pytest
from parity_groups import DROPOUT, Cell, all_cells, ratio, rows_of, run_cells
from ranks import run_ranks

STEPS = 4
CELLS = {
    1: [Cell(1, 1, "zero1", 3, True, DROPOUT), Cell(1, 1, "zero1", 5, False)],
    2: [Cell(2, 1, "fsdp", 5, True, DROPOUT), Cell(2, 1, "hsdp", 3, True)],
    4: [Cell(4, 2, "zero2", 3, True), Cell(4, 2, "zero2", 5, False)],
}


def test_the_grid_has_every_split_of_the_ranks_on_every_engine() -> None:
    cells = all_cells([1, 2, 4])
    assert len(set(cells)) == len(cells)
    counts = Counter((cell.ranks, cell.group, cell.dropout) for cell in cells)
    four, five = 16, 20  # engines x document mask x micro-batch sizes; one process has no HSDP
    assert counts == {
        (1, 1, 0.0): four, (1, 1, DROPOUT): four,
        (2, 1, 0.0): five, (2, 1, DROPOUT): five, (2, 2, 0.0): five,
        (4, 1, 0.0): five, (4, 1, DROPOUT): five, (4, 2, 0.0): five, (4, 4, 0.0): five,
    }  # fmt: skip


def test_a_difference_where_the_plain_loops_have_none_is_infinitely_much() -> None:
    assert (ratio(3e-7, 2e-7), ratio(0.0, 0.0), ratio(1e-7, 0.0)) == (pytest.approx(1.5), 0.0, math.inf)


@pytest.mark.slow
@pytest.mark.parametrize("size", CELLS)
def test_cells_train_as_one_process(size: int, tmp_path: Path) -> None:
    """With dropout, too, as long as no samples are shared: masks follow from the micro-batch, not from the rank."""
    outcomes = run_ranks(run_cells, size, tmp_path, CELLS[size], STEPS)[0]
    for row in rows_of(CELLS[size], outcomes, STEPS):
        # Of sums in fp32 in another order, as in test_parity.py; another dropout mask moves the loss by 1e-3 and more.
        assert row["loss_difference"] < 5e-6, row
        assert row["weight_difference"] < 5e-6, row
