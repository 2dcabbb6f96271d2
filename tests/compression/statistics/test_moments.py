"""Streaming statistics against the definition in float64."""

import pytest
import torch

from svdserve.compression.statistics.moments import Accumulator

ALL = frozenset({"gram", "shift", "teacher_gram", "teacher_magnitude"})
CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [3, 300, 700])  # one panel, and several with a ragged last one
def test_batches_add_up_to_the_definition(n: int):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 37, n, generator=generator)
    x_f = x + 0.1 * torch.randn(2, 37, n, generator=generator)
    accumulator = Accumulator(n, ALL, CPU)
    for row in range(2):
        accumulator.add(x[row : row + 1], x_f[row : row + 1])
    got = accumulator.finish()
    rows, rows_f = x.reshape(-1, n).double(), x_f.reshape(-1, n).double()
    assert got.tokens == 74
    torch.testing.assert_close(got.gram, rows.T @ rows / 74, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.teacher_gram, rows_f.T @ rows_f / 74, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        got.teacher_magnitude, rows_f.abs().mean(dim=0), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(got.shift, (rows_f - rows).T @ rows / 74, atol=1e-6, rtol=1e-5)


def test_equal_streams_have_no_shift():
    x = torch.randn(5, 8)
    accumulator = Accumulator(8, ALL, CPU)
    accumulator.add(x, x.clone())
    shift = accumulator.finish().shift
    assert shift is not None
    assert not shift.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_an_error(value: float):
    x = torch.randn(5, 8)
    x[2, 3] = value
    accumulator = Accumulator(8, frozenset({"gram"}), CPU)
    accumulator.add(x, None)
    with pytest.raises(FloatingPointError, match="not finite"):
        accumulator.finish()
