"""What the benchmarks of models compare: each contender is a model and how vLLM loads it.

A compressed model gets more than its factors: svdserve's kernel for what is not factored, joined
activations and norms. The fair baseline is the dense model with the same (``--load-format
svdserve``), so that a gain over it is due to the factors alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdserve.compression.model.hub import model_name
from svdserve.server.cpu_install import serves_on_cpu
from svdserve.server.worker import LOAD_FORMAT

STOCK = "auto"
"""The load format with which a dense model is as vLLM has it, and a compressed one is served."""


@dataclass(frozen=True)
class Contender:
    """A model directory, and the value of vLLM's ``--load-format``."""

    directory: Path
    load_format: str = STOCK

    @property
    def name(self) -> str:
        """For tables; the fair baseline says what sets it apart from the dense model."""
        name = model_name(str(self.directory))
        return f"{name}, our kernels" if self.load_format == LOAD_FORMAT else name


def contenders(dense: Path, models: Sequence[Path], dtype: str) -> list[Contender]:
    """The dense model, the fair baseline if this machine and dtype have one, the other models.

    Args:
        dense: the dense model's directory.
        models: the compressed models' directories.
        dtype: the value of vLLM's ``--dtype``.
    """
    fair = serves_on_cpu() and dtype in ("auto", "bfloat16")
    baseline = [Contender(dense, LOAD_FORMAT)] if fair else []
    return [Contender(dense), *baseline, *map(Contender, models)]
