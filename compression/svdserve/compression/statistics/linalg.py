"""Whitening, truncated SVD and error measures, all in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTEMPTS = 8


@dataclass(frozen=True)
class Whitening:
    """A square root F [n, n] of the damped Gram matrix: F Fᵀ = H_λ = H + λI.

    ``unwhiten(G)`` returns G F⁻¹ and ``dual(G)`` returns G F⁻ᵀ for G [k, n]. ``damping`` is λ.
    Any square root gives the same singular values and the same optimum (methods differ in which
    they take); Cholesky is the cheap one, the eigendecomposition the one that never fails.
    """

    root: Tensor
    damping: float
    unwhiten: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def whiten(gram: Tensor, ridge: float, *, cholesky: bool = True) -> Whitening:
    """Damp and factor a Gram matrix [n, n].

    λ = ridge · mean(diag H); each failure of Cholesky multiplies λ by 10, eight times at most,
    after which an eigendecomposition with clamped eigenvalues is taken. A zero matrix (inputs that
    never fire) whitens to the identity.
    """
    gram = gram.double()
    scale = float(gram.diagonal().mean())
    if scale <= 0:
        gram, scale = torch.zeros_like(gram), 1.0
        ridge = 1.0
    damping = ridge * scale
    for _ in range(_ATTEMPTS if cholesky else 0):
        root, failed = torch.linalg.cholesky_ex(_with_diagonal(gram, damping))
        if not int(failed):
            return _triangular(root, damping)
        damping = max(damping * 10, 1e-12 * scale)
    damping = ridge * scale
    values, vectors = torch.linalg.eigh(_with_diagonal(gram, damping))
    # A singular Gram matrix with no ridge has eigenvalues of either sign at rounding level.
    roots = values.clamp_min(1e-12 * float(values[-1])).sqrt()
    return Whitening(
        root=vectors * roots,
        damping=damping,
        unwhiten=lambda g: (g / roots) @ vectors.T,
        dual=lambda g: (g @ vectors) / roots,
    )


def lower_products(matrix: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """M Mᵀ [m, m] of a matrix M [m, n], on and below its diagonal.

    In panels of columns: the rows and columns of each, and its values. They spare nearly half of
    the work, which symmetry gives for free.
    """
    m = matrix.shape[0]
    panel = -(-m // max(1, min(6, m // 256)))
    for start in range(0, m, panel):
        rows, columns = slice(start, m), slice(start, min(start + panel, m))
        yield rows, columns, matrix[rows] @ matrix[columns].mT


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle, in place."""
    lower.tril_()
    lower += lower.tril(-1).T
    return lower


def _smaller_gram(matrix: Tensor) -> Tensor:
    """M Mᵀ or, where M [m, n] is tall, Mᵀ M; the lower triangle, which is all that LAPACK reads."""
    short = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    product = short.new_zeros(short.shape[0], short.shape[0])
    for rows, columns, values in lower_products(short):
        product[rows, columns] = values
    return product


def _with_diagonal(gram: Tensor, added: float, share: float = 1.0) -> Tensor:
    """share · G + added · I, with one matrix of memory."""
    found = gram * share
    found.diagonal().add_(added)
    return found


def _triangular(root: Tensor, damping: float) -> Whitening:
    solve = torch.linalg.solve_triangular
    return Whitening(
        root=root,
        damping=damping,
        unwhiten=lambda g: solve(root, g, upper=False, left=False),
        dual=lambda g: solve(root.mT, g, upper=True, left=False),
    )


def shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """(1 − s) G + s · mean(diag G) · I [m, m], float64; I where G is zero.

    Shrinking towards a multiple of the identity (Ledoit and Wolf, 2004) keeps directions alive
    that few gradients have shown.
    """
    gram = gram.double()
    scale = float(gram.diagonal().mean())
    if scale <= 0:
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return _with_diagonal(gram, shrinkage * scale, 1 - shrinkage)


def shrunk_root(gram: Tensor, shrinkage: float) -> Tensor:
    """A lower root C [m, m] of ``shrunk``: C Cᵀ = G_s."""
    return whiten(shrunk(gram, shrinkage), 0.0).root


def squared_singular_values(matrix: Tensor, outer: Tensor | None = None) -> Tensor:
    """σ² of a matrix M [m, n], or of Cᵀ M with C Cᵀ = ``outer`` [m, m], descending [min(m, n)].

    From the smaller Gram matrix: where that is Mᵀ C Cᵀ M, no root C is needed.
    """
    m, n = matrix.shape
    if outer is not None and m > n:
        squared = matrix.mT @ (outer @ matrix)
    else:
        matrix = matrix if outer is None else whiten(outer, 0.0).root.mT @ matrix
        squared = _smaller_gram(matrix)
    values: Tensor = torch.linalg.eigvalsh(squared)
    return values.clamp_min(0).flip(0)


def eigen_root(gram: Tensor) -> Tensor:
    """Q √Λ [n, n] of a Gram matrix H = Q Λ Qᵀ; the identity where H is zero.

    Without a ridge rounding leaves eigenvalues that are not positive: they become the smallest one
    that is (EoRA, arXiv 2410.21271).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    positive = values[values > 0]
    if not len(positive):
        return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    root: Tensor = vectors * values.clamp_min(float(positive[0])).sqrt()
    return root


def left_subspace(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The top ``rank`` left singular vectors U_r [m, r] and all singular values, descending.

    Taken from the eigenvectors of the smaller of M Mᵀ and Mᵀ M in float64: several times cheaper
    than an SVD. Squaring loses components below 1e-8 of the largest, so where rank reaches that
    noise the exact SVD is taken instead.
    """
    m, n = matrix.shape
    tall = m > n
    values, vectors = torch.linalg.eigh(_smaller_gram(matrix))
    sigma = values.clamp_min(0).sqrt().flip(0)
    reach = float(sigma[rank - 1]) / max(float(sigma[0]), 1e-300)
    if reach <= 1e-7:
        left, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sigma
    top = vectors.flip(1)[:, :rank]
    if tall:
        # M V Σ⁻¹ is orthonormal up to 1e-16 / reach²; QR repairs what would be visible.
        top = matrix @ top
        top = top / sigma[:rank] if reach > 1e-4 else torch.linalg.qr(top).Q
    return top, sigma


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> float:
    """‖(W − Ŵ)X‖_F / ‖W X‖_F from H = X Xᵀ.

    Of the weights themselves without a Gram matrix, and where no output differs from zero. Zeros
    that are given back have no error; anything else in place of zeros has an infinite one.
    """
    weight, approximation = weight.double(), approximation.double()
    residual = weight - approximation
    if gram is not None and (whole := _energy(weight, gram)) > 0:
        return math.sqrt(max(_energy(residual, gram), 0.0) / whole)
    lost, whole = float(residual.norm()), float(weight.norm())
    return lost / whole if whole > 0 else (math.inf if lost > 0 else 0.0)


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """‖M X‖²_F = ⟨MᵀM, H⟩, of H = X Xᵀ [n, n] and M [m, n]: half the work of M H."""
    total = 0.0
    for rows, columns, values in lower_products(matrix.mT):
        square = columns.stop - columns.start
        energies = values * gram[rows, columns]
        total += float(energies[:square].sum() + 2 * energies[square:].sum())
    return total
