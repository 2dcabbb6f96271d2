"""SoCo (arXiv 2502.15092): learnable importance scores on the singular spectrum.

Ŵ = Σ s_i σ_i u_i v_iᵀ of the whitened weight. The scores s of the whole model are learned end to
end with a loss of three terms: divergence from the teacher, stored parameters, and polarisation of
the scores. The paper gives neither the weights of the terms nor the number of steps; the values
here are our own.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from svdserve.compression.methods.learner import Learner, weighted
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.methods.svd_llm import svd_llm
from svdserve.compression.statistics.moments import Statistics
from svdserve.compression.system.errors import UserError

_SOFTNESS = 0.05  # softness δ of the ratio term, as a share of 1 − κ
_SHARPEST = 0.1  # width of the gate at the last step

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Stage:
    """Weights of the loss, and the gate on the scores, at one step of the training.

    Args:
        ratio, polarisation: weights of these terms.
        gate: how much the gate affects the amplitudes, 0 to 1.
        width: width of the range of scores over which the gate opens.
    """

    ratio: float
    polarisation: float
    gate: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Soco(Learner):
    """Scores start at 1 and move by equal steps of score · σ.

    The loss's curvature along a score grows with σ, so steps of equal size in the scores would
    shrink the most important components first. The training has three stages:

    1. exploration: the weight of the ratio term grows from zero, and most scores fall;
    2. refinement: all weights are constant, and the scores settle around the target;
    3. decision: the polarisation term grows, and the gate closes on scores below ½.

    Args:
        ratio_weight, polarisation_weight: weights of the terms at the last step, in units of the
            divergence of uniform truncation.
        exploration, refinement: shares of the steps; the decision has the rest.
    """

    ratio_weight: PositiveFloat = 2.0
    polarisation_weight: NonNegativeFloat = 1.0
    exploration: Share = 0.2
    refinement: Share = 0.2

    def __post_init__(self) -> None:
        if self.exploration + self.refinement >= 1:
            raise UserError(
                f"exploration {self.exploration} and refinement {self.refinement} leave no steps "
                "for the decision; their sum must be below 1"
            )

    def stage(self, progress: float) -> Stage:
        """The weights and the gate at ``progress``."""
        settled = self.exploration + self.refinement
        decided = max(0.0, progress - settled) / (1 - settled)
        return Stage(
            ratio=self.ratio_weight * min(1.0, progress / self.exploration),
            polarisation=self.polarisation_weight * decided,
            gate=decided,
            width=_SHARPEST**decided,
        )

    def start(self, strength: Tensor) -> Tensor:
        return torch.ones_like(strength)

    def reach(self, strength: Tensor) -> Tensor:
        return 1 / strength.clamp_min(1)

    def amplitudes(self, scores: Tensor, progress: float) -> Tensor:
        stage = self.stage(progress)
        return scores * (1 - stage.gate + stage.gate * _gate(scores, stage.width))

    def penalty(self, scores: Tensor, price: Tensor, keep: float, progress: float) -> Tensor:
        """λ_r δ softplus(x / δ) + λ_p mean s(1 − s)₊, where the mean is weighted by price.

        x is the stored excess over κ divided by 1 − κ. In this unit the divergence changes by a
        similar multiple for every κ.
        """
        stage = self.stage(progress)
        excess = (price @ _gate(scores, stage.width) - keep) / (1 - keep)
        ratio = _SOFTNESS * softplus(excess / _SOFTNESS)
        undecided = price @ (scores * (1 - scores).clamp_min(0)) / price.sum()
        return stage.ratio * ratio + stage.polarisation * undecided

    def order(self, scores: Tensor, strength: Tensor) -> Tensor:
        return scores * strength

    def kept(self, scores: Tensor) -> Tensor:
        return scores


def _gate(scores: Tensor, width: float) -> Tensor:
    """A ramp from 0 to 1 of the given width, centred on a score of ½."""
    return ((scores - 0.5) / width + 0.5).clamp(0, 1)


@method(
    "soco",
    title="SoCo",
    paper="https://arxiv.org/abs/2502.15092",
    statistics={"teacher_gram"},
    learner=Soco,
)
def soco(weight: Tensor, statistics: Statistics, rank: int, *, ridge: Ridge = 1e-6) -> Solution:
    """The scored components: those of SVD-LLM."""
    plain = svd_llm(weight, statistics, rank, ridge=ridge)
    return Solution(weighted(plain.factors, statistics.teacher_gram), plain.facts)
