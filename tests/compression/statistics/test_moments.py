"""Streaming statistics against the definition in float64."""

import dataclasses

import pytest
import torch

from problems import M, N
from svdserve.compression.methods import METHODS
from svdserve.compression.methods.registry import method
from svdserve.compression.statistics.moments import (
    STATISTICS,
    Batch,
    Statistics,
    Sums,
    needing_gradients,
    of_teacher_alone,
)
from svdserve.compression.system.errors import UserError

ALL = frozenset({"gram", "shift", "teacher_gram", "teacher_magnitude"})
CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [3, 300, 700])  # one panel, and several with a ragged last one
def test_batches_add_up_to_the_definition(n: int):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 37, n, generator=generator)
    x_f = x + 0.1 * torch.randn(2, 37, n, generator=generator)
    sums = Sums(ALL, 7, n, CPU)
    for row in range(2):
        sums.add(Batch(x[row : row + 1], x_f[row : row + 1]))
    got = sums.finish()
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
    sums = Sums(ALL, 7, 8, CPU)
    sums.add(Batch(x, x.clone()))
    shift = sums.finish().shift
    assert shift is not None
    assert not shift.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_an_error(value: float):
    x = torch.randn(5, 8)
    x[2, 3] = value
    sums = Sums({"gram"}, 7, 8, CPU)
    sums.add(Batch(x))
    with pytest.raises(FloatingPointError, match="not finite"):
        sums.finish()


def test_held_out_batches_are_in_no_other_statistic():
    x, x_f = torch.randn(2, 3, 5, 8)
    parted, plain = Sums({"gram", "shift", "held_out"}, 7, 8, CPU), Sums({"gram"}, 7, 8, CPU)
    for row in range(3):
        for sums in (parted, plain):
            sums.add(Batch(x[row], x_f[row]), held_out=row == 1)
    got, whole = parted.finish(), plain.finish()
    assert (got.tokens, whole.tokens) == (10, 15)
    assert got.held_out is not None
    assert got.held_out.tokens == 5
    expected = (x_f[1] - x[1]).T.double() @ x[1].double() / 5
    torch.testing.assert_close(got.held_out.shift, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(2 * got.gram + got.held_out.gram, 3 * whole.gram)
    never = Sums({"gram", "held_out"}, 7, 8, CPU)
    never.add(Batch(x, x_f))
    assert never.finish().held_out is None


def test_rows_of_every_statistic():
    value = {name: torch.randn(6, 6) for name in STATISTICS if name != "held_out"}
    value["row_fisher"] = value["row_fisher"][0]
    got = Statistics(3, **value).of_rows(slice(2, 5))
    assert got.tokens == 3
    assert got.gram is value["gram"]
    assert got.held_out is None
    assert torch.equal(got.gradient_gram, value["gradient_gram"][2:5, 2:5])
    assert torch.equal(got.row_fisher, value["row_fisher"][2:5])


def test_statistics_say_what_they_need():
    assert needing_gradients(STATISTICS) == {"gradient_gram", "row_fisher"}
    assert of_teacher_alone({"teacher_gram", "row_fisher"})
    assert not of_teacher_alone({"teacher_gram", "held_out"})
    assert [n for n, kind in STATISTICS.items() if not kind.teacher] == ["gram"]
    assert {f.name for f in dataclasses.fields(Statistics)} == {"tokens", *STATISTICS}


def test_a_method_of_an_unknown_statistic_is_refused():
    declare = {"title": "T", "paper": "P", "statistics": {"gram", "grams"}}
    with pytest.raises(UserError, match=r"method mine: unknown statistic 'grams'; allowed: gra"):
        method("mine", **declare)
    assert "mine" not in METHODS


def test_gradient_sums_clip_tokens_and_keep_sequences_apart():
    """Against the formulas, token by token and sequence by sequence."""
    g = torch.Generator().manual_seed(2)
    inputs, grads = torch.randn(3, 10, N, generator=g), torch.randn(3, 10, M, generator=g)
    grads[1, 4] *= 1e3
    grads[2, 0] *= 1e-6
    wanted = frozenset({"gradient_gram", "row_fisher"})
    sums = Sums(wanted, M, N, torch.device("cpu"))
    sums.add(Batch(teacher=inputs[:2], gradients=grads[:2]))
    sums.add(Batch(teacher=inputs[2:], gradients=grads[2:]))
    got = sums.finish()
    gram, fisher = torch.zeros(M, M).double(), torch.zeros(M).double()
    for sequence in range(3):
        mean = grads[sequence].double().norm(dim=1).mean()
        slope = torch.zeros(M, N).double()
        for token in range(10):
            x, y = inputs[sequence, token].double(), grads[sequence, token].double()
            slope += torch.outer(y, x)
            y = y / y.norm() * float(y.norm().clamp(0.1 * mean, 10 * mean))
            gram += torch.outer(y, y) / 30
        fisher += slope.square().sum(dim=1) / 30
    torch.testing.assert_close(got.gradient_gram.double(), gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.row_fisher.double(), fisher, rtol=1e-4, atol=1e-4)
    part = got.of_rows(slice(5, 9))
    assert torch.equal(part.gradient_gram, got.gradient_gram[5:9, 5:9])
    assert torch.equal(part.row_fisher, got.row_fisher[5:9])
