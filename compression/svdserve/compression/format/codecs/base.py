"""What a codec is: a matrix [m, n] to the tensors that store it, and back.

A tensor's name is that of its matrix with a suffix: ``""`` for the values themselves, ``_scale``
for scales. Everything that reads or writes matrices asks the codec for suffixes, shapes, dtypes and
values, and never looks at a dtype to guess the codec.
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
        name: in recipes and checkpoints.
        plain: whether a matrix is one floating-point tensor under its own name, as torch and vLLM
            keep dense weights. Such a matrix can be trained where it lies.
        product: which product a server multiplies encoded matrices with. ``float`` decodes them
            when they are loaded; another name is that of a product in server/plugin/products.py.
        axes: for each suffix, which axes of the matrix its tensor has: 0 for rows, 1 for columns.
            By them a TP rank reads its part of a matrix only. None where a matrix cannot be cut
            before it is decoded.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    product: ClassVar[str] = "float"
    axes: ClassVar[Mapping[str, tuple[int, ...]] | None] = None

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a matrix of ``shape`` [m, n], by suffix."""

    @abstractmethod
    def dtypes(self, suffix: str) -> tuple[torch.dtype, ...]:
        """What the tensor of that suffix may be stored in."""

    @abstractmethod
    def encode(self, matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a matrix [m, n], by suffix.

        Args:
            matrix: floating-point.
            dtype: of the model; the dtype of the values where the codec is ``plain``.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix [m, n] in a floating-point ``dtype`` from its tensors by suffix."""

    def check(self, suffix: str, tensor: Tensor) -> None:  # noqa: B027 (most have no rule)
        """Refuse values that no encoder writes; that they are finite is checked elsewhere.

        Raises:
            ValueError: says what is wrong.
        """


@dataclass(frozen=True)
class Storage:
    """What a trained matrix is stored in: a codec, and the dtype for it."""

    codec: Codec
    dtype: torch.dtype

    def rounded(self, matrix: Tensor) -> Tensor:
        """The matrix with the error that storing leaves, in its own dtype."""
        return self.codec.decode(self.codec.encode(matrix, self.dtype), matrix.dtype)

    def encode(self, name: str, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that store the matrix of that name, on the CPU."""
        found = self.codec.encode(matrix, self.dtype)
        return {f"{name}{suffix}": tensor.cpu().contiguous() for suffix, tensor in found.items()}

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The matrix of that name from what ``encode`` gave."""
        return decoded(self.codec, name, tensors, dtype)


def decoded(codec: Codec, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix ``name`` [m, n] from tensors that have its name and suffixes."""
    suffixes = codec.shapes((0, 0))
    return codec.decode({suffix: tensors[f"{name}{suffix}"] for suffix in suffixes}, dtype)
