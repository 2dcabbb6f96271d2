"""Ranks r by the dropped energy, weighted by the curvature at the outputs."""

from collections.abc import Mapping

from svdserve.compression.allocation.least_tail import Share, least_tail
from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("sensitivity", needs_spectra=True)
def sensitivity(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Minimise the sum of dropped energies ‖(W − Ŵ)F‖² times the mean curvature at the outputs.

    Args:
        modules, budget, floor: as for ``energy``.
    """
    spectra = {
        n: e * c
        for n, m in modules.items()
        if (e := m.energies) is not None and (c := m.curvature) is not None
    }
    return least_tail(modules, spectra, budget, floor)
