"""Which rank each factored module gets, under one keep ratio."""

from collections.abc import Mapping

from svdserve.compression.factors import Layout, rank_for_keep


def uniform(
    shapes: Mapping[str, tuple[int, int]], layout: Layout, keep: float
) -> dict[str, int | None]:
    """The same keep ratio κ for every module; None where factors would not be smaller.

    Args:
        shapes: [m, n] of every (stacked) weight, by module name.
        layout: decides how many parameters a rank costs.
        keep: κ.
    """
    return {name: rank_for_keep(layout, m, n, keep) for name, (m, n) in shapes.items()}
