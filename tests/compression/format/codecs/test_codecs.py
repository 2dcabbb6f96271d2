"""What holds for every codec: the tensors are those that it lists, and give the matrix back."""

import pytest
import torch

from svdserve.compression.format.codecs import CODECS, FLOAT, INT8, Codec, Storage, get_codec
from svdserve.compression.format.codecs.base import FLOAT_DTYPES, decoded
from svdserve.compression.system.errors import UserError

BOTH = pytest.mark.parametrize("codec", [FLOAT, INT8], ids=lambda codec: codec.name)


def matrix(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m), dtype=torch.float64)


def test_names_are_those_of_the_registry() -> None:
    assert sorted(CODECS) == ["float", "int8"]
    assert (get_codec("float"), get_codec("int8")) == (FLOAT, INT8)
    with pytest.raises(UserError, match=r"^unknown codec 'int3'; allowed: float, int8$"):
        get_codec("int3")


@BOTH
@pytest.mark.parametrize("shape", [(5, 9), (1, 1), (7, 0)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_tensors_are_those_that_the_codec_lists(
    codec: Codec, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    tensors = codec.encode(matrix(*shape), dtype)
    assert {suffix: tuple(t.shape) for suffix, t in tensors.items()} == codec.shapes(shape)
    assert codec.axes is not None
    assert codec.axes.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert tensor.dtype in codec.dtypes(suffix)
        assert tuple(tensor.shape) == tuple(shape[axis] for axis in codec.axes[suffix])
        codec.check(suffix, tensor)
    for wanted in (torch.float64, *FLOAT_DTYPES):
        back = codec.decode(tensors, wanted)
        assert (back.dtype, tuple(back.shape)) == (wanted, shape)


@BOTH
def test_rows_and_columns_of_the_tensors_are_those_of_the_matrix(codec: Codec) -> None:
    """By ``axes``, which a TP rank cuts its part of a matrix with."""
    tensors = codec.encode(matrix(6, 8), torch.float32)
    assert codec.axes is not None
    rows, columns = slice(2, 5), slice(1, 7)
    cut = {
        suffix: tensor[tuple((rows, columns)[axis] for axis in codec.axes[suffix])]
        for suffix, tensor in tensors.items()
    }
    whole = codec.decode(tensors, torch.float32)
    assert torch.equal(codec.decode(cut, torch.float32), whole[rows, columns])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_float_is_the_matrix_itself(dtype: torch.dtype) -> None:
    given = matrix(4, 6)
    assert FLOAT.plain
    assert torch.equal(FLOAT.encode(given, dtype)[""], given.to(dtype))
    assert torch.equal(FLOAT.decode({"": given.to(dtype)}, torch.float64), given.to(dtype).double())


@BOTH
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_storage_rounds_as_it_stores(codec: Codec, dtype: torch.dtype) -> None:
    given = matrix(5, 9).float()
    storage = Storage(codec, dtype)
    tensors = storage.encode("a.weight", given.T.contiguous().T)
    assert tensors.keys() == {f"a.weight{suffix}" for suffix in codec.suffixes}
    assert all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors.values())
    back = storage.decode("a.weight", tensors | {"b.weight": given})
    assert back.dtype == torch.float32
    assert torch.equal(storage.rounded(given), back)
    assert torch.equal(decoded(codec, "a.weight", tensors, torch.float32), back)
    exact = codec is FLOAT and dtype == torch.float32
    assert torch.equal(back, given) == exact
    torch.testing.assert_close(back, given, rtol=0.01, atol=0.02)
