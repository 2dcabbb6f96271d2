"""Codecs: how a matrix [m, n] becomes the tensors that store it, and back.

A tensor's name is the name of its matrix plus a suffix: ``""`` for the values, ``_scale`` for the
scales. Code that reads or writes matrices asks the codec for suffixes, shapes, dtypes and values,
and never guesses the codec from a dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Codec(ABC):
    """One way to encode a matrix.

    Attributes:
        name: the name in recipes and checkpoints.
        plain: whether a matrix is one floating-point tensor under its own name, as torch and vLLM
            keep dense weights. Such a matrix can be trained in place.
        product: the server's matrix product for encoded matrices. ``float`` decodes them when they
            are loaded; other names refer to the products in server/plugin/products.py.
        axes: the axes of the matrix that each suffix's tensor has: 0 for rows, 1 for columns. A TP
            rank uses them to read only its share of a matrix. None if a matrix must be decoded
            before it can be split.
        revision: counts changes of what ``encode``, ``encode_for`` and ``round_input`` return. A
            job that an older revision began is not resumed.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    product: ClassVar[str] = "float"
    axes: ClassVar[Mapping[str, tuple[int, ...]] | None] = None
    revision: ClassVar[int] = 1

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a matrix of ``shape`` [m, n], by suffix."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of a matrix's tensors."""
        return tuple(self.shapes((0, 0)))

    @abstractmethod
    def dtypes(self, suffix: str) -> tuple[torch.dtype, ...]:
        """The dtypes that the tensor of that suffix may be stored in."""

    @abstractmethod
    def encode(self, matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a matrix [m, n], by suffix.

        Args:
            matrix: a floating-point matrix.
            dtype: the dtype of the model, in which a ``plain`` codec stores the values.
        """

    def encode_for(self, matrix: Tensor, dtype: torch.dtype, gram: Tensor) -> dict[str, Tensor]:
        """The tensors of a matrix [m, n] whose product with given inputs is to change little.

        A codec that rounds may let the columns that it rounds last make up for the first ones.

        Args:
            matrix, dtype: as for ``encode``.
            gram: the sum of x xᵀ [n, n] over the inputs x of the matrix, in float64.
        """
        del gram
        return self.encode(matrix, dtype)

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix [m, n] in a floating-point ``dtype`` from its tensors by suffix."""

    def round_input(self, x: Tensor) -> Tensor:
        """x [..., n] as the server's product with an encoded matrix [m, n] takes it, in any dtype.

        Most products take x as it is.
        """
        return x

    def check(self, suffix: str, tensor: Tensor) -> None:  # noqa: B027 (most have no rule)
        """Refuse values that ``encode`` never writes; callers check that values are finite.

        Raises:
            ValueError: the rest of a sentence that starts with the tensor's name.
        """


@dataclass(frozen=True)
class Storage:
    """How a trained matrix is stored: its codec, and the dtype of the model."""

    codec: Codec
    dtype: torch.dtype

    def rounded(self, matrix: Tensor) -> Tensor:
        """The matrix after encoding and decoding, in its own dtype."""
        return self.codec.decode(self.codec.encode(matrix, self.dtype), matrix.dtype)

    def encode(self, name: str, matrix: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors that store the matrix of that name, on the CPU.

        Args:
            gram: as for ``Codec.encode_for``, in any floating-point dtype; None if it is not known.
        """
        found = (
            self.codec.encode(matrix, self.dtype)
            if gram is None
            else self.codec.encode_for(matrix, self.dtype, gram.to(matrix.device, torch.float64))
        )
        return {f"{name}{suffix}": tensor.cpu().contiguous() for suffix, tensor in found.items()}

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The matrix of that name from the tensors that ``encode`` returned."""
        return decoded(self.codec, name, tensors, dtype)


def decoded(codec: Codec, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix ``name`` [m, n], decoded from the tensors called ``name`` plus suffix."""
    found = {suffix: tensors[f"{name}{suffix}"] for suffix in codec.suffixes}
    return codec.decode(found, dtype)
