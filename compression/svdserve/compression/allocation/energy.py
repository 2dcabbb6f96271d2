"""Ranks by the energy of the outputs that truncation drops."""

from collections.abc import Mapping

from svdserve.compression.allocation.least_tail import Share, least_tail
from svdserve.compression.allocation.registry import Budget, Module, Ranks, allocator


@allocator("energy", needs_spectra=True)
def energy(modules: Mapping[str, Module], budget: Budget, *, floor: Share = 0.5) -> Ranks:
    """Least sum of relative whitened tail energies ‖(W − Ŵ)F‖² / ‖WF‖².

    Args:
        modules, budget: as for all allocators.
        floor: share of its uniform parameters that every module keeps. Without one, loss-driven
            ranks starve modules and hurt (Swift-SVD, arXiv 2604.01609, table 3).
    """
    spectra = {
        n: e / total if (total := e.sum()) > 0 else e  # a weight of zeros has nothing to lose
        for n, m in modules.items()
        if (e := m.energies) is not None
    }
    return least_tail(modules, spectra, budget, floor)
