"""A small linear with inputs and gradients, on which methods are compared with their formulas."""

import torch
from torch import Tensor

from svdserve.compression.statistics.moments import Statistics

M, N, T, R = 24, 32, 600, 7


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
