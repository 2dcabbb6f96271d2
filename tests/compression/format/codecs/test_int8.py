"""Int8 by its definition, and what its scales may be."""

import pytest
import torch
from torch import Tensor

from svdserve.compression.format.codecs import INT8
from svdserve.compression.format.codecs.int8 import dequantized, quantized, quantized_for


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_by_the_definition(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    values, scale = quantized(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row, levels, unit in zip(weight.tolist(), values.tolist(), scale.tolist(), strict=True):
        peak = max(map(abs, row))
        assert unit == pytest.approx(peak / 127, rel=1e-7) if peak else unit > 0
        assert max(map(abs, levels)) == (127 if peak else 0)
        for value, level in zip(row, levels, strict=True):
            assert abs(value - level * unit) <= 0.5000001 * unit
    error = dequantized(values, scale, torch.float64) - weight.double()
    assert float((error.abs() / scale[:, None]).max()) <= 0.5000001
    assert quantized(weight[:, :0])[0].shape == (5, 0)


def test_the_codec_is_that_rounding() -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    tensors = INT8.encode(weight, torch.bfloat16)
    values, scale = quantized(weight)
    assert torch.equal(tensors[""], values)
    assert torch.equal(tensors["_scale"], scale)
    product = values.double() * scale.double()[:, None]
    assert torch.equal(INT8.decode(tensors, torch.float64), product)
    assert torch.equal(INT8.decode(tensors, torch.bfloat16), product.float().bfloat16())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_scales_are_positive(value: float) -> None:
    scale = torch.tensor([1.0, value, 2.0])
    with pytest.raises(ValueError, match="must be positive"):
        INT8.check("_scale", scale)
    INT8.check("_scale", scale.abs().nan_to_num(1.0) + 1)
    INT8.check("", torch.tensor([[-127, 0, 127]], dtype=torch.int8))


def correlated(columns: int, seed: int) -> Tensor:
    """A Gram matrix whose columns are far from independent, as those of language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(400, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.diag(torch.logspace(0, -2, columns, dtype=torch.float64)) @ mixing
    return x.T @ x


@pytest.mark.parametrize("columns", [1, 7, 70])
def test_rounding_for_inputs_by_brute_force(columns: int) -> None:
    """After each column all later ones are fitted anew by least squares; GPTQ only updates them."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    gram = correlated(columns, seed=columns)
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    nearest, scale = quantized(weight)
    left, want = weight.clone(), torch.empty_like(weight)
    for column in range(columns):
        moved = (left[:, column] / scale.double()).round().clamp(-127, 127)
        peak = nearest[:, column].abs() == 127  # stays, for the sake of the scale
        want[:, column] = torch.where(peak, nearest[:, column].double(), moved)
        done, later = slice(0, column + 1), slice(column + 1, columns)
        error = weight[:, done] - want[:, done] * scale.double()[:, None]
        moved = torch.linalg.solve(damped[later, later], damped[later, done] @ error.T).T
        left[:, later] = weight[:, later] + moved
    values, same = quantized_for(weight, gram)
    assert torch.equal(same, scale)
    assert torch.equal(values.double(), want)
    again, _ = quantized(dequantized(values, scale, torch.float32))
    assert torch.equal(again, values)


def test_rounding_for_inputs_keeps_their_products() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(40, 90, generator=generator).double(), correlated(90, seed=1)

    def error(encoded: dict[str, Tensor]) -> float:
        change = INT8.decode(encoded, torch.float64) - weight
        return float((change @ gram @ change.T).trace())

    plain = error(INT8.encode(weight, torch.float32))
    assert error(INT8.encode_for(weight, torch.float32, gram)) < 0.3 * plain
    assert error(INT8.encode_for(weight, torch.float32, torch.zeros(90, 90))) == plain
    nothing = INT8.encode_for(weight[:, :0], torch.float32, gram[:0, :0])
    assert nothing[""].shape == (40, 0)
