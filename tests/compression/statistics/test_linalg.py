"""Whitening and truncated SVD on hard matrices."""

import pytest
import torch

from svdserve.compression.statistics.linalg import (
    eigen_root,
    left_subspace,
    lower_products,
    mirrored,
    relative_error,
    shrunk,
    shrunk_root,
    squared_singular_values,
    whiten,
)


def gram_of(kind: str, n: int = 24) -> torch.Tensor:
    x = torch.randn(n, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if kind == "dead":
        x[::3] = 0
    elif kind == "deficient":
        x[n // 2 :] = x[: n - n // 2]
    elif kind == "single token":
        x = x[:, :1]
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "graded":
        x *= torch.logspace(0, -7, n, dtype=torch.float64)[:, None]
    return x @ x.T / x.shape[1]


KINDS = ("full", "dead", "deficient", "single token", "zero", "graded")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cholesky", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_root_and_its_inverses(kind: str, cholesky: bool, ridge: float):
    gram = gram_of(kind)
    whitening = whiten(gram, ridge, cholesky=cholesky)
    root, eye = whitening.root, torch.eye(24, dtype=torch.float64)
    damped = gram + whitening.damping * eye
    torch.testing.assert_close(root @ root.T, damped, rtol=0, atol=1e-10 * float(damped.max()))
    assert whitening.unwhiten(root).sub(eye).abs().max() < 1e-5
    assert whitening.dual(root.T.contiguous()).sub(eye).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["full", "dead", "deficient"])
def test_singular_values_do_not_depend_on_the_root(kind: str):
    """methods.md 1.1 (i): Cholesky and eigh whiten to the same spectrum."""
    gram, weight = gram_of(kind), torch.randn(15, 24, dtype=torch.float64)
    values = [
        torch.linalg.svdvals(weight @ whiten(gram, 1e-3, cholesky=cholesky).root)
        for cholesky in (True, False)
    ]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("kind", ["full", "dead", "deficient", "single token", "zero"])
@pytest.mark.parametrize("columns", [9, 24, 60])
def test_squared_singular_values_in_a_metric(kind: str, columns: int):
    """Tall matrices need no root of the metric; wide ones take one."""
    outer, matrix = shrunk(gram_of(kind), 0.3), torch.randn(24, columns, dtype=torch.float64)
    plain, metric = squared_singular_values(matrix), squared_singular_values(matrix, outer)
    torch.testing.assert_close(plain, torch.linalg.svdvals(matrix) ** 2)
    root = shrunk_root(gram_of(kind), 0.3)
    torch.testing.assert_close(root @ root.mT, outer)
    torch.testing.assert_close(metric, torch.linalg.svdvals(root.mT @ matrix) ** 2)


@pytest.mark.parametrize("m", [1, 255, 600, 1700])  # one panel, and several with a ragged last one
def test_half_a_symmetric_product_mirrored_is_the_whole(m: int):
    matrix = torch.randn(m, 5, dtype=torch.float64)
    lower = torch.full((m, m), 7.0, dtype=torch.float64)  # nothing above the diagonal is used
    for rows, columns, values in lower_products(matrix):
        lower[rows, columns] = values
    torch.testing.assert_close(mirrored(lower), matrix @ matrix.T)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (12, 12), (900, 600)])
@pytest.mark.parametrize("rank", [1, 7, 10])
def test_left_subspace_is_that_of_the_svd(shape: tuple[int, int], rank: int):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left, sigma = left_subspace(matrix, rank)
    exact_left, exact_sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(sigma, exact_sigma)
    projector = exact_left[:, :rank] @ exact_left[:, :rank].T
    torch.testing.assert_close(left @ left.T, projector)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
def test_left_subspace_beyond_the_numerical_rank(shape: tuple[int, int]):
    matrix = torch.ones(shape, dtype=torch.float64)
    left, _ = left_subspace(matrix, 6)
    torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(left @ (left.T @ matrix), matrix)


@pytest.mark.parametrize("n", [24, 700])
def test_relative_error_is_that_of_the_outputs(n: int):
    x = torch.randn(n, 50, dtype=torch.float64)
    weight, other = torch.randn(2, 9, n, dtype=torch.float64)
    want = ((weight - other) @ x).norm() / (weight @ x).norm()
    assert relative_error(weight, other, x @ x.T) == pytest.approx(float(want))
    assert relative_error(weight, weight, None) == 0


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
