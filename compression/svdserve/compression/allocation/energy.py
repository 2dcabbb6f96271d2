"""Ranks r by the energy of the outputs that truncation drops."""

from collections.abc import Mapping

from svdserve.compression.allocation.least_tail import Share, least_tail
from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("energy", needs_spectra=True)
def energy(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Minimise the sum of relative dropped energies ‖(W − Ŵ)F‖² / ‖WF‖².

    Args:
        modules, budget: as for all allocators.
        floor: least keep ratio of each module as a share of κ. Without a floor, some modules get so
            few parameters that quality falls (Swift-SVD, arXiv 2604.01609, table 3).
    """
    spectra = {
        n: e / total if (total := e.sum()) > 0 else e  # a weight of zeros loses nothing
        for n, m in modules.items()
        if (e := m.energies) is not None
    }
    return least_tail(modules, spectra, budget, floor)
