"""The activations of all calibration tokens, in memory or in files."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from svdserve.compression.system.files import reserve


class Streams:
    """Named activations [N, L, width] of all calibration tokens, in memory or in files.

    Rows are read as float32 on ``device`` and stored in ``dtype``.

    Args:
        shape: (N, L).
        dtype: the dtype of the stored values.
        device: the device of the values that are read.
        folder: the folder for files; None keeps the activations in memory.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path | None
    ) -> None:
        self.rows, self.length = shape
        self._dtype, self._device, self._folder = dtype, device, folder
        self._tensors: dict[str, Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, rows: slice | Tensor) -> Tensor:
        return self._tensors[name][rows].to(device=self._device, dtype=torch.float32)

    def write(self, name: str, rows: slice, value: Tensor) -> None:
        if name not in self._tensors:
            self._tensors[name] = self._allocate(name, value.shape[-1])
        self._tensors[name][rows] = value.to(device="cpu", dtype=self._dtype)

    def _allocate(self, name: str, width: int) -> Tensor:
        shape = (self.rows, self.length, width)
        if self._folder is None:
            return torch.empty(shape, dtype=self._dtype)
        # The file is unlinked once it is open, so a killed job leaves no file behind.
        descriptor, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".bin", dir=self._folder)
        size = self.rows * self.length * width
        try:
            with os.fdopen(descriptor, "wb") as file:
                # With a sparse file, a full disk would end the process with SIGBUS.
                reserve(file, size * self._dtype.itemsize)
            stream = torch.from_file(path, shared=True, size=size, dtype=self._dtype)
        finally:
            os.unlink(path)
        return stream.view(shape)

    def drop(self, *names: str) -> None:
        for name in names:
            self._tensors.pop(name, None)
