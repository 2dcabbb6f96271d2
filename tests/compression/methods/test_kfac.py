"""Methods with a metric of the outputs, kfac-svd and saes-kfac, against float64 oracles."""

import pytest
import torch
from torch import Tensor

from problems import R, problem, statistics_of, truncated
from svdserve.compression.methods import get_method
from svdserve.compression.methods.saes_svd import saes_svd


def two_sided_error(change: Tensor, outer: Tensor, inner: Tensor) -> float:
    """tr(δᵀ G δ H), the loss that a change of W causes to second order (twice)."""
    return float(((outer @ change) * (change @ inner)).sum())


def shrunk(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal().mean()
    return (1 - share) * gram + share * mean * torch.eye(len(gram), dtype=gram.dtype)


def test_kfac_svd_is_the_truncation_between_symmetric_roots():
    """Ŵ = G^-½ [G^½ W H^½]_r H^-½; no other approximation of the rank causes less loss."""
    weight, x, x_f = problem()
    stats = statistics_of(x, x_f)
    ours = get_method("kfac-svd").solve(weight, stats, R, {}).factors.dense()
    outer, inner = shrunk(stats.gradient_gram, 0.3), shrunk(stats.teacher_gram, 0.1)
    roots = []
    for gram in (outer, inner):
        values, vectors = torch.linalg.eigh(gram)
        roots.append((vectors * values.sqrt()) @ vectors.T)
    middle = truncated(roots[0] @ weight @ roots[1], R)
    oracle = torch.linalg.inv(roots[0]) @ middle @ torch.linalg.inv(roots[1])
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-8)
    least = two_sided_error(weight - ours, outer, inner)
    for other in ("svd-llm", "svd", "asvd"):
        change = weight - get_method(other).solve(weight, stats, R, {}).factors.dense()
        assert two_sided_error(change, outer, inner) > least


@pytest.mark.parametrize("beta", [0.4, "aces"])
def test_saes_kfac_without_curvature_is_saes_svd(beta: float | str):
    """Shrunk wholly to the identity, the metric of the outputs drops out."""
    weight, x, x_f = problem()
    stats = statistics_of(x, x_f)
    ours = get_method("saes-kfac").solve(weight, stats, R, {"shrinkage": 1.0, "beta": beta})
    reference = get_method("saes-svd").solve(weight, stats, R, {"beta": beta})
    assert ours.facts == reference.facts
    torch.testing.assert_close(ours.factors.dense(), reference.factors.dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_saes_kfac_minimises_the_shifted_objective_in_its_metric(beta: float):
    """‖Cᵀ(ŴX − Z)‖ with Z = W((1 − β)X + βX_f), whatever root C of G is taken."""
    weight, x, x_f = problem()
    stats = statistics_of(x, x_f)
    parameters = {"beta": beta, "ridge": 1e-12, "shrinkage": 0.2}
    factors = get_method("saes-kfac").solve(weight, stats, R, parameters).factors
    values, vectors = torch.linalg.eigh(shrunk(stats.gradient_gram, 0.2))
    root = (vectors * values.sqrt()).T
    target = weight @ ((1 - beta) * x + beta * x_f)

    def loss(approximation: Tensor) -> float:
        return float((root @ (approximation @ x - target)).square().sum())

    start = loss(factors.dense())
    outer, inner = factors.factor_out, factors.factor_in
    for _ in range(30):
        right = torch.linalg.lstsq(x.T, target.T).solution.T
        inner = torch.linalg.lstsq(root @ outer, root @ right).solution
        outer = torch.linalg.lstsq((inner @ x).T, target.T).solution.T
    assert loss(outer @ inner) >= start * (1 - 1e-9)
    plain = saes_svd(weight, stats, R, beta=beta, ridge=1e-12).factors
    assert loss(plain.dense()) > start * 1.01
