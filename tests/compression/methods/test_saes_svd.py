"""SAES-SVD and its choice of β against the formulas of the paper (arXiv 2602.03051)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from problems import M, N, R, T, problem, statistics_of, truncated
from svdserve.compression.methods import get_method
from svdserve.compression.methods.saes_svd import energies, exact_search, saes_svd, tail_ratio
from svdserve.compression.methods.svd_llm import svd_llm
from svdserve.compression.statistics.linalg import whiten


def objective(weight: Tensor, approximation: Tensor, x: Tensor, x_f: Tensor, beta: float) -> float:
    """Equation 3 over 1 + α: (1 − β)‖(Ŵ − W)X‖² + β‖ŴX − W X_f‖²."""
    own = ((approximation - weight) @ x).square().sum()
    aligned = (approximation @ x - weight @ x_f).square().sum()
    return float((1 - beta) * own + beta * aligned)


def test_beta_zero_on_equal_streams_is_svd_llm():
    weight, _, x_f = problem()
    stats = statistics_of(x_f, x_f)
    ours = saes_svd(weight, stats, R, beta=0.0, ridge=1e-6).factors.dense()
    root = torch.linalg.cholesky(x_f @ x_f.T / T)
    oracle = torch.linalg.solve(root.T, truncated(weight @ root, R).T).T
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-5)
    reference = svd_llm(weight, stats, R, ridge=1e-6).factors.dense()
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_beta_one_is_aa_svd():
    """min ‖W X_f − Ŵ X‖: the truncation of W X_f Xᵀ F⁻ᵀ (AA-SVD, arXiv 2604.02119)."""
    weight, x, x_f = problem()
    aa_svd = get_method("aa-svd")
    ours = aa_svd.solve(weight, statistics_of(x, x_f), R, {"ridge": 0.0}).factors.dense()
    root = torch.linalg.cholesky(x @ x.T)
    target = torch.linalg.solve_triangular(root, (weight @ x_f @ x.T).T, upper=False).T
    oracle = torch.linalg.solve(root.T, truncated(target, R).T).T
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.75])
def test_alternating_least_squares_finds_nothing_better(beta: float):
    weight, x, x_f = problem()
    factors = saes_svd(weight, statistics_of(x, x_f), R, beta=beta, ridge=1e-12).factors
    start = objective(weight, factors.dense(), x, x_f, beta)
    outer, inner = factors.factor_out, factors.factor_in
    target = weight @ ((1 - beta) * x + beta * x_f)
    for _ in range(30):
        inner = torch.linalg.lstsq(outer, torch.linalg.lstsq(x.T, target.T).solution.T).solution
        outer = torch.linalg.lstsq((inner @ x).T, target.T).solution.T
    assert objective(weight, outer @ inner, x, x_f, beta) >= start * (1 - 1e-9)
    # The oracle does go down from anywhere else, so it would have seen a better point.
    worse = svd_llm(weight, statistics_of(x_f, x), R).factors
    assert objective(weight, worse.dense(), x, x_f, beta) > start


@pytest.mark.parametrize("name", ["saes-svd", "saes-kfac"])
def test_held_out_beta_is_the_one_of_least_error_there(name: str):
    """Against the outputs themselves, on inputs that the fit has not seen."""
    weight, x, x_f = problem()
    half = T // 2
    held_out = statistics_of(x[:, half:], x_f[:, half:])
    stats = replace(statistics_of(x[:, :half], x_f[:, :half]), held_out=held_out)
    method = get_method(name)
    assert method.needs({"beta": "held-out"}) == method.statistics | {"held_out"}
    caps = {"beta_range": (0.0, 1.0)}
    solution = method.solve(weight, stats, R, {"beta": "held-out", **caps})
    errors = {}
    for beta in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        dense = method.solve(weight, stats, R, {"beta": beta}).factors.dense()
        errors[beta] = float((dense @ x[:, half:] - weight @ x_f[:, half:]).norm())
    assert solution.facts["beta"] == pytest.approx(min(errors, key=errors.get))
    assert solution.facts["beta"] > 0


@pytest.mark.parametrize("shape", [(M, N), (60, N)])
def test_tail_ratio_is_the_energy_outside_the_subspaces(shape: tuple[int, int]):
    g = torch.Generator().manual_seed(7)
    base, pull = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    u, _, v = torch.linalg.svd(base, full_matrices=False)
    off_left = torch.eye(shape[0], dtype=torch.float64) - u[:, :R] @ u[:, :R].T
    off_right = torch.eye(shape[1], dtype=torch.float64) - v[:R].T @ v[:R]
    ratio = tail_ratio(energies(base, pull), R)
    for beta in (-0.5, 0.0, 0.3, 1.0):
        whole = base + beta * pull
        want = (off_left @ whole @ off_right).square().sum() / whole.square().sum()
        assert ratio(beta) == pytest.approx(float(want), rel=1e-9)


def test_tail_ratio_is_exact_at_zero_and_so_is_its_derivative():
    """Fixed-subspace first-order approximation, equations 15 to 19."""
    weight, x, x_f = problem()
    statistics = statistics_of(x, x_f)
    whitening = whiten(statistics.gram, 1e-3)
    base = weight @ whitening.root
    pull = whitening.dual(weight @ statistics.shift)

    def true_ratio(beta: float) -> float:
        energy = torch.linalg.svdvals(base + beta * pull).square()
        return float(energy[R:].sum() / energy.sum())

    ratio = tail_ratio(energies(base, pull), R)
    assert ratio(0.0) == pytest.approx(true_ratio(0.0), rel=1e-10)
    step = 1e-5
    slope = (true_ratio(step) - true_ratio(-step)) / (2 * step)
    assert (ratio(step) - ratio(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_stationary_points_have_no_slope():
    weight, x, x_f = problem(3)
    statistics = statistics_of(x, x_f)
    whitening = whiten(statistics.gram, 1e-3)
    pull = whitening.dual(weight @ statistics.shift)
    ratio = tail_ratio(energies(weight @ whitening.root, pull), R)
    points = ratio.stationary_points()
    assert len(points) == 2
    for point in points:
        slope = (ratio(point + 1e-5) - ratio(point - 1e-5)) / 2e-5
        assert abs(slope) < 1e-7


def test_aces_takes_the_best_candidate_within_its_caps():
    weight, x, x_f = problem()
    statistics = statistics_of(x, x_f)
    whitening = whiten(statistics.gram, 1e-3)
    pull = whitening.dual(weight @ statistics.shift)
    ratio = tail_ratio(energies(weight @ whitening.root, pull), R)
    beta = saes_svd(weight, statistics, R, beta="aces").facts["beta"]
    grid = torch.linspace(0.25, 0.75, 501).tolist()
    assert 0.25 <= beta <= 0.75
    assert ratio(beta) <= min(map(ratio, grid)) + 1e-12


@pytest.mark.parametrize("shape", [(M, N), (60, N)])
def test_exact_search_is_brute_force(shape: tuple[int, int]):
    g = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    pull = 0.8 * torch.randn(shape, generator=g, dtype=torch.float64) - 0.5 * truncated(base, 3)

    def tail(beta: float) -> float:
        energy = torch.linalg.svdvals(base + beta * pull).square()
        return float(energy[R:].sum() / energy.sum())

    grid = torch.linspace(0.0, 1.0, 6, dtype=torch.float64).tolist()
    assert exact_search(energies(base, pull), R, 0.0, 1.0) == pytest.approx(min(grid, key=tail))


def test_no_shift_means_beta_zero():
    weight, x, _ = problem()
    for beta in ("aces", "exact", 0.5):
        assert saes_svd(weight, statistics_of(x, x), R, beta=beta).facts["beta"] == 0.0
