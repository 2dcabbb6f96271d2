"""Int8 by its definition, and what its scales may be."""

import pytest
import torch

from svdserve.compression.format.codecs import INT8
from svdserve.compression.format.codecs.int8 import dequantized, quantized


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
