"""Low-rank linear kernels. ``lowrank_linear`` is the one public operation."""

from svdserve.kernels.reference import lowrank_linear

__all__ = ["lowrank_linear"]
