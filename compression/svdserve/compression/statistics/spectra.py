"""The spectra that allocators compare modules by, gathered while the gradients sweep the teacher.

For each module, with F Fᵀ the Gram matrix of the teacher's inputs and C Cᵀ that of the gradients
at its outputs: the squared singular values of W F, those of Cᵀ W F, and the mean diagonal of C Cᵀ.
Kept as one file for each block, so that a resumed job plans the same ranks.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.statistics.gradients import Flow
from svdserve.compression.statistics.linalg import shrunk, squared_singular_values, whiten
from svdserve.compression.statistics.moments import Batch, Statistics, Sums

_RIDGE = 1e-3
_SHRINKAGE = 0.3
_STATISTICS = ("teacher_gram", "gradient_gram")


class Spectra:
    """Writes and reads the spectra of a model's modules.

    Args:
        folder: where the files are, or will be.
        units: for every block, the modules of each group: (name, rows of the stacked weight).
    """

    def __init__(self, folder: Path, units: list[dict[str, list[tuple[str, slice]]]]) -> None:
        self._folder, self._units = folder, units
        self._sums: dict[str, Sums] = {}

    def _file(self, block: int) -> Path:
        return self._folder / f"spectra-{block:05d}.safetensors"

    @property
    def complete(self) -> bool:
        """Whether all blocks have their file."""
        return all(self._file(block).exists() for block in range(len(self._units)))

    def watch(self, _block: int, flows: dict[str, Flow]) -> None:
        """Add one sequence of the block in hand."""
        for group, flow in flows.items():
            if group not in self._sums:
                n, m = flow.inputs.shape[-1], flow.gradients.shape[-1]
                self._sums[group] = Sums(_STATISTICS, m, n, flow.inputs.device)
            self._sums[group].add(Batch(teacher=flow.inputs, gradients=flow.gradients))

    def finish(self, block: int, weights: dict[str, Tensor]) -> None:
        """Write the spectra of a block; ``weights`` are the stacked ones [m, n] of its groups.

        Raises:
            FloatingPointError: names the first module whose inputs or gradients are not finite.
        """
        tensors: dict[str, Tensor] = {}
        for group, sums in self._sums.items():
            try:
                statistics = sums.finish()
            except FloatingPointError as error:
                first = self._units[block][group][0][0]
                raise FloatingPointError(f"{first}: {error}") from None
            for name, rows in self._units[block][group]:
                found = _spectra(weights[group][rows].double(), statistics.of_rows(rows))
                tensors |= {f"{name}.{key}": value.cpu() for key, value in found.items()}
        self._sums.clear()
        self._folder.mkdir(exist_ok=True)
        save_tensors(tensors, self._file(block))

    def read(self) -> dict[str, Tensor]:
        """``<module>.energies``, ``<module>.curvature`` and ``<module>.losses`` of all modules."""
        files = (self._file(block) for block in range(len(self._units)))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _spectra(weight: Tensor, statistics: Statistics) -> dict[str, Tensor]:
    assert statistics.teacher_gram is not None
    assert statistics.gradient_gram is not None
    base = weight @ whiten(statistics.teacher_gram, _RIDGE).root
    outer = shrunk(statistics.gradient_gram, _SHRINKAGE)
    return {
        "energies": squared_singular_values(base),
        "curvature": statistics.gradient_gram.diagonal().double().mean(),
        "losses": squared_singular_values(base, outer) / 2,
    }
