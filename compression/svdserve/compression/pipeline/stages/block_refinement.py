"""Block refinement: train the factors of one block towards the teacher's block.

The loss is the mean squared error between the output of the student's block, which reads the
student's stream, and the output of the teacher's block. Training thus also corrects errors of
earlier blocks. This is the block refinement of AA-SVD (arXiv 2604.02119), whose authors find that
it contributes most to their result. Norms are not trained.
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
    """Objective (trainer.py) whose gradient is divided by ``unit``, the loss at the start.

    Outputs of blocks differ by orders of magnitude, but AdamW and gradient clipping need gradients
    of similar scale.
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
    """Train the factors of a block after all of its groups are replaced.

    Args:
        block: the block, which gets the trained factors; call its ``finish`` with ``refined``.
        settings: the settings of the training, which uses all sequences of the streams.
        stored: codec and dtype of each factor, by its name inside the block.
        notify: as for Trainer.train.

    Returns:
        The tensors of Trainer.best by their names inside the block, and the held-out mean squared
        errors.
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
