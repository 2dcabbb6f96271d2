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
    Every square root gives the same singular values and the same optimum. Cholesky is the cheapest,
    and the eigendecomposition never fails.
    """

    root: Tensor
    damping: float
    unwhiten: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def whiten(gram: Tensor, ridge: float, *, cholesky: bool = True) -> Whitening:
    """Damp and factor a Gram matrix [n, n].

    λ = ridge · mean(diag H). Each failure of Cholesky multiplies λ by 10; after eight failures, or
    if ``cholesky`` is False, an eigendecomposition with clamped eigenvalues is used. A zero matrix
    gives the identity.
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
    # Rounding gives a singular Gram matrix small eigenvalues of either sign if ridge is 0.
    roots = values.clamp_min(1e-12 * float(values[-1])).sqrt()
    return Whitening(
        root=vectors * roots,
        damping=damping,
        unwhiten=lambda g: (g / roots) @ vectors.T,
        dual=lambda g: (g @ vectors) / roots,
    )


def lower_products(matrix: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The entries of M Mᵀ [m, m] on and below the diagonal, for M [m, n].

    Yields panels of columns as (rows, columns, values). By symmetry the panels need only little
    more than half of the work of the whole product.
    """
    m = matrix.shape[0]
    panel = -(-m // max(1, min(6, m // 256)))
    for start in range(0, m, panel):
        rows, columns = slice(start, m), slice(start, min(start + panel, m))
        yield rows, columns, matrix[rows] @ matrix[columns].mT


def mirrored(lower: Tensor) -> Tensor:
    """Copy the lower triangle of a matrix to its upper triangle, in place."""
    lower.tril_()
    lower += lower.tril(-1).T
    return lower


def _smaller_gram(matrix: Tensor) -> Tensor:
    """The lower triangle, which LAPACK reads, of the smaller of M Mᵀ and Mᵀ M, for M [m, n]."""
    short = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    product = short.new_zeros(short.shape[0], short.shape[0])
    for rows, columns, values in lower_products(short):
        product[rows, columns] = values
    return product


def _with_diagonal(gram: Tensor, added: float, share: float = 1.0) -> Tensor:
    """share · G + added · I, in the memory of one matrix."""
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
    """(1 − s) G + s · mean(diag G) · I [m, m], float64; the identity if G is zero.

    Shrinking towards a multiple of the identity (Ledoit and Wolf, 2004) gives some weight to
    directions that occur in few gradients.
    """
    gram = gram.double()
    scale = float(gram.diagonal().mean())
    if scale <= 0:
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return _with_diagonal(gram, shrinkage * scale, 1 - shrinkage)


def shrunk_root(gram: Tensor, shrinkage: float) -> Tensor:
    """A lower triangular root C [m, m] of the shrunk matrix G_s: C Cᵀ = G_s."""
    return whiten(shrunk(gram, shrinkage), 0.0).root


def squared_singular_values(matrix: Tensor, outer: Tensor | None = None) -> Tensor:
    """σ² [min(m, n)] of M [m, n], or of Cᵀ M with C Cᵀ = ``outer`` [m, m], descending.

    They are eigenvalues of the smaller Gram matrix. If that is Mᵀ C Cᵀ M, the root C is not needed.
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
    """Q √Λ [n, n] of a Gram matrix H = Q Λ Qᵀ; the identity if H is zero.

    Eigenvalues that are not positive after rounding are replaced by the smallest positive one
    (EoRA, arXiv 2410.21271).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    positive = values[values > 0]
    if not len(positive):
        return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    root: Tensor = vectors * values.clamp_min(float(positive[0])).sqrt()
    return root


def left_subspace(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The top ``rank`` left singular vectors U_r [m, r] and all singular values, descending.

    They come from the eigenvectors of the smaller of M Mᵀ and Mᵀ M in float64, which is several
    times cheaper than an SVD. Squaring loses components below 1e-8 of the largest, so an exact SVD
    is used if ``rank`` includes components close to that limit.
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
        # M V Σ⁻¹ is orthonormal up to 1e-16 / reach²; QR restores orthonormality for small reach.
        top = matrix @ top
        top = top / sigma[:rank] if reach > 1e-4 else torch.linalg.qr(top).Q
    return top, sigma


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> float:
    """‖(W − Ŵ)X‖_F / ‖W X‖_F from the Gram matrix H = X Xᵀ, for W and Ŵ [m, n].

    Without a Gram matrix, or if W X is zero, this is ‖W − Ŵ‖_F / ‖W‖_F. If W is zero too, the error
    is 0 for a zero Ŵ and infinite for any other.
    """
    weight, approximation = weight.double(), approximation.double()
    residual = weight - approximation
    if gram is not None and (whole := _energy(weight, gram)) > 0:
        return math.sqrt(max(_energy(residual, gram), 0.0) / whole)
    lost, whole = float(residual.norm()), float(weight.norm())
    return lost / whole if whole > 0 else (math.inf if lost > 0 else 0.0)


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """‖M X‖²_F = ⟨MᵀM, H⟩ for H = X Xᵀ [n, n] and M [m, n], at half the work of M H."""
    total = 0.0
    for rows, columns, values in lower_products(matrix.mT):
        square = columns.stop - columns.start
        energies = values * gram[rows, columns]
        total += float(energies[:square].sum() + 2 * energies[square:].sum())
    return total
