"""Ranks r by the predicted divergence from the teacher that dropped components cause."""

from collections.abc import Mapping

from svdserve.compression.allocation.least_tail import Share, least_tail
from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("divergence", needs_spectra=True)
def divergence(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Minimise the divergence from the teacher that the two-sided (Kronecker) metric predicts.

    Args:
        modules, budget, floor: as for ``energy``.
    """
    spectra = {n: loss for n, m in modules.items() if (loss := m.losses) is not None}
    return least_tail(modules, spectra, budget, floor)
