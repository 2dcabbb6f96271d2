"""ACIP (arXiv 2502.01717): masks on the singular components, learned through a threshold.

Ŵ = U diag(mask) Uᵀ W, where U comes from the plain SVD. The mask is 1 for scores above a threshold
and 0 below; its gradient is passed straight through to the scores. An L1 term with a growing weight
closes components until the budget is met. Two things differ from the paper: ``svdserve refine``
takes the place of its LoRA, and the teacher's predictions take the place of labels.
"""

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor

from svdserve.compression.methods.learner import Learner, weighted
from svdserve.compression.methods.registry import Solution, method
from svdserve.compression.methods.svd import svd
from svdserve.compression.statistics.moments import Statistics

_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Acip(Learner):
    """Scores start between ½ and 1 in the order of σ, so that all components are open.

    With all components open the model equals the teacher and its divergence has no gradient.
    Therefore the order of σ decides which components close first.

    Args:
        l1_weight: weight of the L1 term at the last step, to which it grows linearly, in units of
            the divergence of uniform truncation.
    """

    learning_rate: PositiveFloat = 0.02
    l1_weight: PositiveFloat = 10.0

    def start(self, strength: Tensor) -> Tensor:
        return _THRESHOLD + (1 - _THRESHOLD) * strength / (1 + strength)

    def amplitudes(self, scores: Tensor, progress: float) -> Tensor:  # noqa: ARG002
        mask = (scores > _THRESHOLD).to(scores)
        return mask + scores - scores.detach()

    def penalty(self, scores: Tensor, price: Tensor, keep: float, progress: float) -> Tensor:
        """λ Σ price · s / (1 − κ) while the open components store more than κ, else 0."""
        over = bool(price @ (scores > _THRESHOLD).to(scores) > keep)
        return (self.l1_weight * progress * over / (1 - keep)) * (price @ scores)

    def order(self, scores: Tensor, strength: Tensor) -> Tensor:  # noqa: ARG002
        return scores

    def kept(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores)


@method(
    "acip",
    title="ACIP",
    paper="https://arxiv.org/abs/2502.01717",
    statistics=set(),
    learner=Acip,
)
def acip(weight: Tensor, statistics: Statistics, rank: int) -> Solution:
    """The scored components: the singular components of the weight."""
    return Solution(weighted(svd(weight, statistics, rank).factors, None))
