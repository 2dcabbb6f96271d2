"""Block refinement: train the factors of one block towards the teacher's block.

The loss is the mean squared error between the student block's output, from the student's stream,
and the teacher's block output: what earlier blocks lost is made up for as well. AA-SVD, arXiv
2604.02119, block refinement; it finds this the dominant factor of its result. Norms stay as they
are.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from svdserve.compression.format.codecs import Storage
from svdserve.compression.model.modules import trainable_factors
from svdserve.compression.pipeline.walk.walk import BlockPass
from svdserve.compression.training.trainer import State, Trainer, Training


class _BlockError:
    """Objective (trainer.py); the gradient is of the loss over ``unit``, the loss at the start.

    The outputs of blocks differ by orders of magnitude, and AdamW and clipping have a scale.
    """

    def __init__(self, block: BlockPass, settings: Training) -> None:
        self.block, self.settings, self.unit = block, settings, 1.0

    def backward(self, rows: Tensor, step: int) -> None:  # noqa: ARG002
        torch.autograd.backward(self._loss(rows) / self.unit)

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> float:
        return float(self._loss(rows))

    def _loss(self, rows: Tensor) -> Tensor:
        with self.settings.autocast(self.block.walk.device):
            student, teacher = self.block.outputs(rows)
        return mse_loss(student.float(), teacher)


def refine_block(
    block: BlockPass,
    settings: Training,
    stored: Mapping[str, Storage],
    notify: Callable[[int, State], None] = lambda *_: None,
) -> tuple[dict[str, Tensor], State]:
    """Train the factors of a block whose groups are all replaced.

    Args:
        block: it goes on with the result; ``finish`` must be told.
        settings: the training; the sequences are those of the streams.
        stored: what each factor is stored in, by its name inside the block.
        notify: as in Trainer.train.

    Returns:
        The factors as Trainer.best gives them, by their names inside the block, and the held-out
        squared errors.
    """
    factors = trainable_factors(block.student)
    objective = _BlockError(block, settings)
    stored = {name: stored[name] for name in factors}
    trainer = Trainer(factors, stored, objective, settings, block.walk.streams.rows)
    objective.unit = trainer.held_out_loss() or 1.0
    state = trainer.train(notify)
    best = trainer.best()
    for name, factor in factors.items():
        factor.requires_grad_(False).copy_(stored[name].decode(name, best))
        factor.grad = None
    return best, state
