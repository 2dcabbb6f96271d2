"""The comparators svd, fwsvd, asvd, res-svd, eora and ada-svd against their papers' formulas."""

import pytest
import torch
from torch import Tensor

from problems import M, N, R, T, problem, statistics_of, truncated
from svdserve.compression.methods import get_method

SHARE = 2 * (M + N) / (M * N)  # two of the seven ranks for a residual


def test_plain_svd_is_eckart_young():
    weight, x, x_f = problem()
    got = get_method("svd").solve(weight, statistics_of(x, x_f), R, {}).factors.dense()
    torch.testing.assert_close(got, truncated(weight, R))


def test_fwsvd_is_the_truncation_of_the_weighted_rows():
    """Ŵ = Î⁻¹ [Î W]_r (arXiv 2207.00112, equation 7); rows without information count least."""
    weight, x, x_f = problem()
    stats = statistics_of(x, x_f)
    stats.row_fisher[3] = 0
    got = get_method("fwsvd").solve(weight, stats, R, {}).factors.dense()
    fisher = stats.row_fisher.clone()
    fisher[3] = torch.cat([fisher[:3], fisher[4:]]).min()
    scale = fisher.sqrt()[:, None]
    torch.testing.assert_close(got, truncated(scale * weight, R) / scale)


def test_asvd_is_the_truncation_of_the_scaled_weight():
    """Ŵ = [W S]_r S⁻¹ with S = diag(mean |x|)^½ (arXiv 2312.05821, equations 5 to 8)."""
    weight, x, x_f = problem()
    got = get_method("asvd").solve(weight, statistics_of(x, x_f), R, {}).factors.dense()
    scale = x_f.abs().mean(dim=1).sqrt()
    torch.testing.assert_close(got, truncated(weight * scale, R) / scale)


@pytest.mark.parametrize("metric", ["whitened", "plain"])
@pytest.mark.parametrize("residual_metric", ["whitened", "plain"])
def test_res_svd_adds_the_truncated_residual(metric: str, residual_metric: str):
    weight, x, x_f = problem()
    given = {"residual_share": SHARE, "metric": metric, "residual_metric": residual_metric}
    statistics = statistics_of(x, x_f)
    got = get_method("res-svd").solve(weight, statistics, R, {**given, "ridge": 0.0}).factors
    root = torch.linalg.cholesky(x @ x.T / T)

    def in_metric(name: str, matrix: Tensor, rank: int) -> Tensor:
        if name == "plain":
            return truncated(matrix, rank)
        return torch.linalg.solve(root.T, truncated(matrix @ root, rank).T).T

    first = in_metric(metric, weight, R - 2)
    second = in_metric(residual_metric, weight - first, 2)
    assert got.rank == R
    torch.testing.assert_close(got.dense(), first + second, rtol=0, atol=1e-6)
    at_once = in_metric(metric, weight, R)
    if metric == residual_metric:  # Eckart and Young: nothing is gained in one metric
        torch.testing.assert_close(got.dense(), at_once, rtol=0, atol=1e-6)
    else:
        assert (got.dense() - at_once).norm() > 0.01 * at_once.norm()


@pytest.mark.parametrize("base", ["svd", "asvd"])
def test_eora_adds_the_error_truncated_in_the_eigenspace_of_the_inputs(base: str):
    """B' = U_r Σ_r, A' = V_rᵀ Q'⁻¹ of ΔW Q', Q' = Q √Λ (arXiv 2410.21271, Algorithm 1)."""
    weight, x, x_f = problem()
    given = {"base": base, "alpha": 0.7, "residual_share": SHARE}
    got = get_method("eora").solve(weight, statistics_of(x, x_f), R, given).factors
    scale = x_f.abs().mean(dim=1) ** 0.7 if base == "asvd" else torch.ones(N).double()
    first = truncated(weight * scale, R - 2) / scale
    values, vectors = torch.linalg.eigh(x @ x.T / T)
    eigenspace = vectors * values.sqrt()
    lost = truncated((weight - first) @ eigenspace, 2) @ torch.linalg.inv(eigenspace)
    assert got.rank == R
    torch.testing.assert_close(got.dense(), first + lost, rtol=0, atol=1e-8)
    again = get_method("res-svd").solve(
        weight,
        statistics_of(x, x_f),
        R,
        {"metric": "plain", "residual_metric": "whitened", "residual_share": SHARE, "ridge": 0.0},
    )
    if base == "svd":
        torch.testing.assert_close(got.dense(), again.factors.dense(), rtol=0, atol=1e-8)


def test_ada_svd_alternates_least_squares_on_the_inputs():
    weight, x, x_f = problem()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    outer, inner = u[:, :R] * s[:R], v[:R]
    for _ in range(2):
        outer = torch.linalg.lstsq((inner @ x).T, (weight @ x).T).solution.T
        inner = torch.linalg.pinv(outer) @ weight
    given = {"iterations": 2, "ridge": 0.0}
    got = get_method("ada-svd").solve(weight, statistics_of(x, x_f), R, given).factors.dense()
    torch.testing.assert_close(got, outer @ inner, rtol=0, atol=1e-6)
