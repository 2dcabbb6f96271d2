"""Methods against independent float64 oracles (formulas: SAES-SVD, arXiv 2602.03051)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdserve.compression.methods import METHODS, get_method, markdown_table
from svdserve.compression.methods.saes_svd import energies, exact_search, saes_svd, tail_ratio
from svdserve.compression.methods.svd_llm import svd_llm
from svdserve.compression.statistics.linalg import eigen_root, whiten
from svdserve.compression.statistics.moments import Batch, Statistics, Sums
from svdserve.compression.system.errors import UserError

M, N, T, R = 24, 32, 600, 7
SHARE = 2 * (M + N) / (M * N)  # two of the seven ranks for a residual


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and correlated student and teacher inputs [n, T] of falling energy."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, N, generator=g, dtype=torch.float64)
    mix *= torch.logspace(0, -1.5, N, dtype=torch.float64)
    x_f = mix @ torch.randn(N, T, generator=g, dtype=torch.float64)
    x = 0.9 * x_f + 0.2 * mix.flip(1) @ torch.randn(N, T, generator=g, dtype=torch.float64)
    return torch.randn(M, N, generator=g, dtype=torch.float64), x, x_f


def gradients(m: int = M) -> Tensor:
    """Gradients [m, T] at the outputs, of falling energy."""
    g = torch.Generator().manual_seed(9)
    scale = torch.logspace(0, -2, m, dtype=torch.float64)[:, None]
    mix = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64)).Q
    return mix @ (scale * torch.randn(m, T, generator=g, dtype=torch.float64))


def statistics_of(x: Tensor, x_f: Tensor, m: int = M) -> Statistics:
    t, g = x.shape[1], gradients(m)[:, : x.shape[1]]
    magnitude = x_f.abs().mean(dim=1)
    return Statistics(
        t,
        gram=x @ x.T / t,
        shift=(x_f - x) @ x.T / t,
        teacher_gram=x_f @ x_f.T / t,
        teacher_magnitude=magnitude,
        gradient_gram=g @ g.T / t,
        row_fisher=(g @ x_f.T).square().sum(dim=1) / t,
    )


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


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


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(M, N), (N, M), (N, N)])
def test_full_rank_gives_the_weight_back(name: str, shape: tuple[int, int]):
    m, n = shape
    g = torch.Generator().manual_seed(5)
    x_f = torch.randn(n, T, generator=g, dtype=torch.float64)
    weight = torch.randn(m, n, generator=g, dtype=torch.float64)
    method = get_method(name)
    statistics = statistics_of(x_f, x_f, m)
    factors = method.solve(weight, statistics, min(m, n), method.hyper_parameters).factors
    torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=1e-8)


def test_plain_svd_is_eckart_young():
    weight, x, x_f = problem()
    got = get_method("svd").solve(weight, statistics_of(x, x_f), R, {}).factors.dense()
    torch.testing.assert_close(got, truncated(weight, R))


def two_sided_error(change: Tensor, outer: Tensor, inner: Tensor) -> float:
    """tr(δᵀ G δ H), the loss that a change of W causes to second order (twice)."""
    return float(((outer @ change) * (change @ inner)).sum())


def shrunk(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal().mean()
    return (1 - share) * gram + share * mean * torch.eye(len(gram), dtype=gram.dtype)


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


def test_gradient_sums_clip_tokens_and_keep_sequences_apart():
    """Against the formulas, token by token and sequence by sequence."""
    g = torch.Generator().manual_seed(2)
    inputs, grads = torch.randn(3, 10, N, generator=g), torch.randn(3, 10, M, generator=g)
    grads[1, 4] *= 1e3
    grads[2, 0] *= 1e-6
    wanted = frozenset({"gradient_gram", "row_fisher"})
    sums = Sums(wanted, M, N, torch.device("cpu"))
    sums.add(Batch(teacher=inputs[:2], gradients=grads[:2]))
    sums.add(Batch(teacher=inputs[2:], gradients=grads[2:]))
    got = sums.finish()
    gram, fisher = torch.zeros(M, M).double(), torch.zeros(M).double()
    for sequence in range(3):
        mean = grads[sequence].double().norm(dim=1).mean()
        slope = torch.zeros(M, N).double()
        for token in range(10):
            x, y = inputs[sequence, token].double(), grads[sequence, token].double()
            slope += torch.outer(y, x)
            y = y / y.norm() * float(y.norm().clamp(0.1 * mean, 10 * mean))
            gram += torch.outer(y, y) / 30
        fisher += slope.square().sum(dim=1) / 30
    torch.testing.assert_close(got.gradient_gram.double(), gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.row_fisher.double(), fisher, rtol=1e-4, atol=1e-4)
    part = got.of_rows(slice(5, 9))
    assert torch.equal(part.gradient_gram, got.gradient_gram[5:9, 5:9])
    assert torch.equal(part.row_fisher, got.row_fisher[5:9])


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


def test_eigenvalues_that_rounding_made_negative_become_the_smallest_positive_one():
    g = torch.Generator().manual_seed(4)
    vectors = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    rounded, want = (
        (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T
        for values in ([-1e-9, 0.5, 2.0, 3.0], [0.5, 0.5, 2.0, 3.0])
    )
    root = eigen_root(rounded)
    torch.testing.assert_close(root @ root.T, want)
    assert torch.equal(eigen_root(torch.zeros(4, 4)), torch.eye(4).double())


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


@pytest.mark.parametrize("kind", ["dead", "deficient", "duplicate", "one token", "silent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_hard_statistics_give_good_finite_factors(kind: str, dtype: torch.dtype, name: str):
    weight, x, x_f = problem()
    if kind == "dead":
        x, x_f = x.clone(), x_f.clone()
        x[::4] = 0
        x_f[::4] = 0
    elif kind == "deficient":
        x, x_f = x[:, : N // 2], x_f[:, : N // 2]
    elif kind == "duplicate":
        x, x_f = x[:, :3].repeat(1, 50), x_f[:, :3].repeat(1, 50)
    elif kind == "one token":
        x, x_f = x[:, :1], x_f[:, :1]
    elif kind == "silent":
        x, x_f = torch.zeros_like(x), torch.zeros_like(x_f)
    method = get_method(name)
    statistics = statistics_of(x, x_f)
    stored = weight.to(dtype)
    solution = method.solve(stored, statistics, R, method.hyper_parameters)
    got = solution.factors.dense()
    assert got.isfinite().all()
    if kind in ("duplicate", "one token") and name in (
        "saes-svd",
        "saes-kfac",
        "svd-llm",
        "aa-svd",
    ):
        # No more distinct tokens than ranks: the outputs aimed at are met but for the ridge.
        beta = solution.facts.get("beta", 1.0)
        inputs = x if "gram" in method.statistics else x_f
        aim = stored.double() @ (x + beta * (x_f - x))
        assert (got @ inputs - aim).norm() < 0.02 * aim.norm()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"beta": "often"}, "beta is 'often': .*'aces', 'exact' or 'held-out'"),
        ({"beta": 1.5}, "beta is 1.5: .*less than or equal to 1"),
        ({"beta_range": (0.8, 0.2)}, "lower bound must not be above"),
        ({"ridge": -1}, "ridge is -1: .*greater than or equal to 0"),
        ({"gamma": 1}, "no hyper-parameter 'gamma'; it takes: beta, beta_range, ridge"),
    ],
)
def test_wrong_hyper_parameters_are_refused(parameters: dict, message: str):
    with pytest.raises(UserError, match=message):
        get_method("saes-svd").schema.check(parameters)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'best'.*saes-kfac, saes-svd, soco, svd, svd-llm"):
        get_method("best")


def test_the_readme_has_the_table_of_methods():
    """Written by `svdserve methods --markdown`."""
    assert markdown_table() in (Path(__file__).parents[3] / "README.md").read_text()
