"""The formula of FLOPs against torch's counter, on the widths of 20 published models."""

import pytest
from flops_of_shapes import SHAPES, deviation


@pytest.mark.parametrize(("number", "name"), list(enumerate(SHAPES)))
def test_the_formula_counts_what_torch_counts(number: int, name: str) -> None:
    flops, off = deviation(name, checkpoint_every=number % 3, num_layers=2)
    assert flops > 1e8
    assert abs(off) < 1e-3
