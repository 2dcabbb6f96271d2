"""SoCo (arXiv 2502.15092): learnable importance scores on the singular spectrum.

Ŵ = Σ s_i σ_i u_i v_iᵀ of the whitened weight, with scores of the whole model learned end to end
and a loss of three terms: divergence from the teacher, stored parameters, polarisation of the
scores. The weights of the terms and the number of steps are not published; those here are ours.
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

_SOFTNESS = 0.05  # of the ratio term, in shares of what κ removes
_SHARPEST = 0.1  # width of the gate at the end

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Stage:
    """Weights of the loss, and the gate on the scores, at one moment of the training.

    Args:
        ratio, polarisation: weights of those terms.
        gate: how much of the gate acts on the amplitudes, 0 to 1.
        width: of the scores between shut and open.
    """

    ratio: float
    polarisation: float
    gate: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Soco(Learner):
    """Scores start at 1, and move by equal steps of score · σ: the greater σ, the more the loss
    curves along a score, and steps of one size would first of all shrink what matters most.

    Three stages, in each of which every weight stays or rises:

    1. exploration: the ratio term grows from nothing to its full weight, and most scores fall;
    2. refinement: all is constant, and the scores settle around the target;
    3. decision: the polarisation term grows, and the gate closes on scores below ½.

    Args:
        ratio_weight, polarisation_weight: of the terms at the end; the divergence of uniform
            truncation is 1.
        exploration, refinement: shares of the steps; the rest is for the decision.
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
        """The schedule."""
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
        """λ_r δ softplus(x / δ) + λ_p mean of s(1 − s)₊, weighted by what they store.

        x is the excess over κ as a share of 1 − κ: the divergence rises by a few times its value
        at κ over that range, whatever κ is.
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
    """0 below, 1 above, linear over ``width`` around ½; at width 1 the score itself."""
    return ((scores - 0.5) / width + 0.5).clamp(0, 1)


@method(
    "soco",
    title="SoCo",
    paper="https://arxiv.org/abs/2502.15092",
    statistics={"teacher_gram"},
    learner=Soco,
)
def soco(weight: Tensor, statistics: Statistics, rank: int, *, ridge: Ridge = 1e-6) -> Solution:
    """The components that are scored: those of SVD-LLM."""
    plain = svd_llm(weight, statistics, rank, ridge=ridge)
    return Solution(weighted(plain.factors, statistics.teacher_gram), plain.facts)
