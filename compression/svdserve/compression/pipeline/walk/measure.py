"""The student's error behind a block, measured on some sequences in float32.

The streams of the walk are stored in the recipe's dtype and run in its precision. In bfloat16 the
rounding errors of teacher and student differ, which alone gives an error of about 0.01.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svdserve.compression.model.architecture import Call
from svdserve.compression.system.precision import float32_products

_TOKENS = 4096


def measured_rows(rows: int, length: int) -> list[int]:
    """Indices of the measured sequences: a sixteenth, but at least 4,096 tokens if there are."""
    count = min(rows, max(-(-_TOKENS // length), rows // 16))
    return [index * rows // count for index in range(count)]


class Measured:
    """Float32 hidden states [1, L, d] of some sequences, in the teacher and in the student.

    Args:
        device: the device of the blocks; the hidden states stay on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hidden: dict[str, list[Tensor]] = {"teacher": [], "student": []}

    def add(self, hidden: Tensor) -> None:
        """Add a sequence by its hidden states [L, d] or [1, L, d] at the first block's input."""
        for states in self._hidden.values():
            states.append(hidden.to(device="cpu", dtype=torch.float32))

    @torch.no_grad()
    def advance(self, blocks: Mapping[str, nn.Module], call: Call) -> None:
        """Carry the sequences over a block, given as its copies ``teacher`` and ``student``."""
        args, kwargs = call
        with float32_products("float32", self._device):
            for name, block in blocks.items():
                states = self._hidden[name]
                for index, hidden in enumerate(states):
                    output = block(hidden.to(self._device), *args, **kwargs)
                    states[index] = (output[0] if isinstance(output, tuple) else output).cpu()

    def error(self) -> float:
        """‖H_f − H‖ / ‖H_f‖ for the teacher's hidden states H_f and the student's H."""
        apart = whole = 0.0
        for teacher, student in zip(*self._hidden.values(), strict=True):
            apart += float((teacher.double() - student.double()).square().sum())
            whole += float(teacher.double().square().sum())
        if whole == 0:
            return math.inf if apart > 0 else 0.0
        return math.sqrt(apart / whole)
