"""A cache of results that depend only on the teacher and the calibration tokens.

Compressions of one model that differ in method, keep ratio, layout or allocator share the teacher's
gradients at the block boundaries, its spectra, and the statistics of its inputs and gradients. If a
method also needs statistics of the student, none of its statistics are cached.

Several processes may share a cache. One process sweeps the teacher while the others wait for its
files. Two processes may collect the same statistics at the same time; they write the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.model.architecture import Group
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.statistics.moments import Statistics, of_teacher_alone
from svdserve.compression.system.files import exclusive, remove_temporaries


def cache_folder(root: Path, skeleton: Skeleton, tokens: Tensor, settings: dict[str, Any]) -> Path:
    """The folder in ``root`` for one teacher, calibration and order of summation.

    Args:
        root: the folder of the cache.
        skeleton: the teacher.
        tokens: the calibration tokens [N, L].
        settings: everything else that changes the cached values, as JSON values.
    """
    key = hashlib.sha256(json.dumps([skeleton.files.fingerprint, settings]).encode())
    key.update(tokens.contiguous().numpy().tobytes())
    folder = root / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def sweeping(folder: Path) -> Iterator[None]:
    """Inside the block, no other process sweeps the teacher into this folder."""
    with exclusive(folder / "sweep", wait=True):
        for kind in ("gradient", "hidden", "spectra"):
            remove_temporaries(folder, f"{kind}-*")
        yield


class TeacherStatistics:
    """Cached statistics of the teacher, one file for each group of each block.

    Args:
        folder: the result of ``cache_folder``.
        skeleton: the teacher.
        wanted: names of the statistics to read and write; all must be of the teacher only.

    Attributes:
        ready: whether all statistics were cached at the start, so that no pass over the tokens is
            needed.
    """

    def __init__(self, folder: Path, skeleton: Skeleton, wanted: frozenset[str]) -> None:
        assert of_teacher_alone(wanted)
        self._folder, self._wanted = folder, wanted
        with self._writing():
            remove_temporaries(folder, "statistics-*")
        self.ready = all(
            self._file(index, group).exists()
            for index, groups in enumerate(skeleton.groups)
            for group in groups
        )

    def _file(self, block: int, group: Group) -> Path:
        names = "+".join(sorted(self._wanted))
        return self._folder / f"statistics-{block:05d}-{group.path}-{names}.safetensors"

    def read(self, block: int, group: Group, device: torch.device) -> Statistics:
        tensors = load_file(self._file(block, group), device=str(device))
        return Statistics(int(tensors.pop("tokens")), **tensors)

    def write(self, block: int, group: Group, statistics: Statistics) -> None:
        tensors: dict[str, Tensor] = {
            name: getattr(statistics, name).cpu().contiguous() for name in self._wanted
        }
        tensors["tokens"] = torch.tensor(statistics.tokens)
        with self._writing():
            save_tensors(tensors, self._file(block, group))

    def _writing(self) -> AbstractContextManager[None]:
        return exclusive(self._folder / "statistics", wait=True)
