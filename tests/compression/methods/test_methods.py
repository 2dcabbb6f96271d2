"""What holds for every method: exactness at full rank, hard statistics, names and parameters."""

from pathlib import Path

import pytest
import torch

from problems import M, N, R, T, problem, statistics_of
from svdserve.compression.methods import METHODS, get_method, markdown_table
from svdserve.compression.system.errors import UserError


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
