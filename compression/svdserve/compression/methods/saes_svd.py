"""SAES-SVD (arXiv 2602.03051, ICLR 2026): cumulative-error-aware layer compression.

CEALC moves the output of a factored module towards the output in the *original* model. With
H = X Xᵀ and Δ = (X_f − X) Xᵀ, its optimum is the rank-r truncation of G(β) = W (H + βΔ) F⁻ᵀ, where
F Fᵀ = H (equations 6 to 12) and β = α / (1 + α). ACES chooses β (equations 13 to 19). Here the
damped H_λ = H + λI replaces H in the metric and in the target: G(β) = W F + β W Δ F⁻ᵀ and
W_eff = W + β W Δ H_λ⁻¹. Full rank therefore returns W_eff for every λ, and W for β = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.registry import Ridge, Solution, method
from svdserve.compression.statistics.linalg import left_subspace, whiten
from svdserve.compression.statistics.moments import Statistics

_GRID = 6


def _ordered(caps: tuple[float, float]) -> tuple[float, float]:
    if caps[0] > caps[1]:
        raise ValueError("the lower bound must not be above the upper bound")
    return caps


Share = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
Beta = Share | Literal["aces", "exact", "held-out"]


def beta_needs(hyper_parameters: dict[str, Any]) -> set[str]:
    """The names of the statistics that the choice of β reads besides H and Δ."""
    return {"held_out"} if hyper_parameters["beta"] == "held-out" else set()


@method(
    "saes-svd",
    title="SAES-SVD",
    paper="https://arxiv.org/abs/2602.03051",
    statistics={"gram", "shift"},
    extra_statistics=beta_needs,
)
def saes_svd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    beta: Beta = "aces",
    beta_range: Range = (0.25, 0.75),
    ridge: Ridge = 1e-3,
) -> Solution:
    """CEALC with a fixed β, or with a β that a rule chooses for each module.

    Args:
        weight: [m, n], float64.
        statistics: H and Δ of the module's inputs.
        rank: r, in 1..min(m, n).
        beta: a number in [0, 1], or a rule. ``aces`` is the paper's closed form (a first-order
            approximation with fixed subspaces); ``exact`` searches for the least dropped share of
            energy; ``held-out`` searches for the least error against the teacher's outputs on
            held-out sequences.
        beta_range: bounds of β for the rules (paper, table 4).
        ridge: λ / mean(diag H).
    """

    def truncate(whitened: Tensor, effective: Tensor) -> Factors:
        left, _ = left_subspace(whitened, rank)
        return Factors(factor_in=left.mT @ effective, factor_out=left)

    return solve_shifted(weight, statistics, rank, beta, beta_range, ridge, truncate)


def solve_shifted(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    beta: Beta,
    caps: Range,
    ridge: float,
    truncate: Callable[[Tensor, Tensor], Factors],
) -> Solution:
    """CEALC with any truncation.

    Args:
        weight, statistics, rank, beta, ridge: as for ``saes_svd``.
        caps: ``beta_range`` of ``saes_svd``.
        truncate: computes factors of rank r from G(β) = W F + β W Δ F⁻ᵀ and
            W_eff = W + β W Δ H_λ⁻¹ = G(β) F⁻¹, both [m, n].
    """
    assert statistics.gram is not None
    assert statistics.shift is not None
    whitening = whiten(statistics.gram, ridge)
    base = weight @ whitening.root
    pull = whitening.dual(weight @ statistics.shift.double())
    moved = whitening.unwhiten(pull)

    def factors(at: float) -> Factors:
        return truncate(base + at * pull, weight + at * moved)

    # If Δ is zero (the first block's q, k, v), every β gives the same factors.
    if not bool(statistics.shift.any()):
        chosen = 0.0
    elif beta == "held-out":
        held_out = statistics.held_out or statistics
        grid: list[float] = torch.linspace(*caps, _GRID, dtype=torch.float64).tolist()
        chosen = min(grid, key=lambda at: output_error(factors(at).dense(), weight, held_out))
    elif isinstance(beta, str):
        search = aces if beta == "aces" else exact_search
        chosen = search(energies(base, pull), rank, *caps)
    else:
        chosen = float(beta)
    return Solution(factors(chosen), {"beta": chosen, "damping": whitening.damping})


def output_error(approximation: Tensor, weight: Tensor, statistics: Statistics) -> float:
    """‖Ŵ X − W X_f‖² / T up to a constant, from H and Δ, since X_f Xᵀ / T = H + Δ."""
    assert statistics.gram is not None
    assert statistics.shift is not None
    own = approximation @ statistics.gram.double()
    both = weight @ (statistics.gram + statistics.shift).double()
    return float((own * approximation).sum() - 2 * (both * approximation).sum())


@dataclass(frozen=True)
class TailRatio:
    """ρ̃(β) = (a + 2bβ + cβ²) / (A + 2Bβ + Cβ²), the approximate share of energy that is dropped.

    The approximation keeps the singular subspaces of G(0) for all β (equations 15 to 19). Its value
    and its derivative are exact at β = 0.
    """

    a: float
    b: float
    c: float
    whole_a: float
    whole_b: float
    whole_c: float

    def __call__(self, beta: float) -> float:
        tail = self.a + 2 * self.b * beta + self.c * beta**2
        whole = self.whole_a + 2 * self.whole_b * beta + self.whole_c * beta**2
        return tail / whole if whole > 0 else 1.0

    def stationary_points(self) -> list[float]:
        """Real roots of (cB − bC) β² + (cA − aC) β + (bA − aB)."""
        quadratic = self.c * self.whole_b - self.b * self.whole_c
        linear = self.c * self.whole_a - self.a * self.whole_c
        constant = self.b * self.whole_a - self.a * self.whole_b
        scale = max(abs(quadratic), abs(linear), abs(constant))
        if scale == 0:
            return []
        # Scale so that squares do not overflow for large weights; a power of two does not round.
        unit = math.frexp(scale)[1]
        quadratic, linear, constant = (
            math.ldexp(value, -unit) for value in (quadratic, linear, constant)
        )
        scale = math.ldexp(scale, -unit)
        if abs(quadratic) <= 1e-12 * scale:
            return [-constant / linear] if abs(linear) > 1e-12 * scale else []
        discriminant = linear**2 - 4 * quadratic * constant
        if discriminant < 0:
            return []
        # The root without cancellation, and the other root by Vieta's formula.
        half = -(linear + (1 if linear >= 0 else -1) * discriminant**0.5) / 2
        return [half / quadratic, constant / half] if half != 0 else [0.0]


@dataclass(frozen=True)
class Energies:
    """S Sᵀ, S Dᵀ and D Dᵀ [k, k] of G(β) = S + βD [m, n], k = min(m, n), transposed if m > n.

    The choice of β needs only G Gᵀ = S Sᵀ + β (S Dᵀ + D Sᵀ) + β² D Dᵀ.
    """

    square: Tensor
    cross: Tensor
    shift: Tensor


def energies(base: Tensor, pull: Tensor) -> Energies:
    """The energies of G(β) = base + β pull, both [m, n]."""
    if base.shape[0] > base.shape[1]:
        base, pull = base.mT, pull.mT
    return Energies(base @ base.mT, base @ pull.mT, pull @ pull.mT)


def tail_ratio(energy: Energies, rank: int) -> TailRatio:
    """The coefficients of ρ̃ for a truncation to ``rank``.

    P and P' project onto the complements of the top left and right singular subspaces of S. Then
    c = ‖P D P'‖² is computed as ‖P D‖² − ‖P D V_r‖², with D V_r = D Sᵀ U_r Σ_r⁻¹.
    """
    values, vectors = torch.linalg.eigh(energy.square)
    values = values.clamp_min(0)
    top, sigma = vectors[:, -rank:], values[-rank:].sqrt()
    sigma = sigma.clamp_min(1e-8 * float(sigma[-1])) if float(sigma[-1]) > 0 else sigma + 1
    seen = energy.cross.mT @ top / sigma
    seen = seen - top @ (top.mT @ seen)
    outside = energy.shift.trace() - ((energy.shift @ top) * top).sum()
    return TailRatio(
        a=float(values[:-rank].sum()),
        b=float(energy.cross.trace() - ((energy.cross @ top) * top).sum()),
        c=float((outside - seen.square().sum()).clamp_min(0)),
        whole_a=float(energy.square.trace()),
        whole_b=float(energy.cross.trace()),
        whole_c=float(energy.shift.trace()),
    )


def aces(energy: Energies, rank: int, beta_min: float, beta_max: float) -> float:
    """ACES: the β of least ρ̃ among the two bounds and the stationary points between them."""
    ratio = tail_ratio(energy, rank)
    inside = [root for root in ratio.stationary_points() if beta_min < root < beta_max]
    return min([beta_min, beta_max, *inside], key=ratio)


def exact_search(energy: Energies, rank: int, beta_min: float, beta_max: float) -> float:
    """The β that drops the least share of energy, from an even grid of six between the bounds."""
    best = (float("inf"), beta_min)
    both = energy.cross + energy.cross.mT
    for beta in torch.linspace(beta_min, beta_max, _GRID, dtype=torch.float64).tolist():
        values = torch.linalg.eigvalsh(energy.square + beta * both + beta**2 * energy.shift)
        whole = float(values.sum())
        tail = float(values[:-rank].clamp_min(0).sum())
        best = min(best, (tail / whole if whole > 0 else 1.0, beta))
    return best[1]
