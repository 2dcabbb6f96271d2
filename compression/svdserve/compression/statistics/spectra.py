"""The spectra by which allocators compare modules, collected during the sweep of the teacher.

Let F Fᵀ be the Gram matrix of the teacher's inputs and C Cᵀ the Gram matrix of the gradients at a
module's outputs. The module's spectra are the squared singular values of W F (``energies``) and
half of those of Cᵀ W F (``losses``); ``curvature`` is the mean diagonal of the gradients' Gram
matrix. Each block has its own file, so that a resumed job plans the same ranks.
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
        folder: the folder for the files.
        modules: for every block, the modules of each group by its path; a module is given as its
            name and its rows of the group's stacked weight.
    """

    def __init__(self, folder: Path, modules: list[dict[str, list[tuple[str, slice]]]]) -> None:
        self._folder, self._modules = folder, modules
        self._sums: dict[str, Sums] = {}

    def _file(self, block: int) -> Path:
        return self._folder / f"spectra-{block:05d}.safetensors"

    @property
    def complete(self) -> bool:
        """Whether every block has its file."""
        return all(self._file(block).exists() for block in range(len(self._modules)))

    def watch(self, _block: int, flows: dict[str, Flow]) -> None:
        """Add one sequence of the current block."""
        for group, flow in flows.items():
            if group not in self._sums:
                n, m = flow.inputs.shape[-1], flow.gradients.shape[-1]
                self._sums[group] = Sums(_STATISTICS, m, n, flow.inputs.device)
            self._sums[group].add(Batch(teacher=flow.inputs, gradients=flow.gradients))

    def finish(self, block: int, weights: dict[str, Tensor]) -> None:
        """Write the spectra of a block.

        Args:
            block: the block's index.
            weights: the stacked weight [m, n] of each of its groups, by path.

        Raises:
            FloatingPointError: inputs or gradients are not finite; the message names the first
                module.
        """
        tensors: dict[str, Tensor] = {}
        for group, sums in self._sums.items():
            try:
                statistics = sums.finish()
            except FloatingPointError as error:
                first = self._modules[block][group][0][0]
                raise FloatingPointError(f"{first}: {error}") from None
            for name, rows in self._modules[block][group]:
                found = _spectra(weights[group][rows].double(), statistics.of_rows(rows))
                tensors |= {f"{name}.{key}": value.cpu() for key, value in found.items()}
        self._sums.clear()
        self._folder.mkdir(exist_ok=True)
        save_tensors(tensors, self._file(block))

    def read(self) -> dict[str, Tensor]:
        """Tensors ``<module>.energies``, ``.curvature`` and ``.losses`` of all modules."""
        files = (self._file(block) for block in range(len(self._modules)))
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
