"""Ranks by the divergence from the teacher that dropping components is predicted to cause."""

from collections.abc import Mapping

from svdserve.compression.allocation.least_tail import Share, least_tail
from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("divergence", needs_spectra=True)
def divergence(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Least divergence from the teacher as the two-sided (Kronecker-factored) metric predicts."""
    spectra = {n: loss for n, m in modules.items() if (loss := m.losses) is not None}
    return least_tail(modules, spectra, budget, floor)
