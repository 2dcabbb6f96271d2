"""Layouts: how a weight of rank r is stored in matrices and indices, one file each.

``LAYOUTS`` has them by name. An installed package adds one by the entry point ``svdserve.layouts``.
"""

from svdserve.compression.format.layouts.base import Factors, InputShare, Layout
from svdserve.compression.format.layouts.interpolative import Interpolative
from svdserve.compression.format.layouts.pair import Pair
from svdserve.compression.system.registry import Registry

LAYOUTS: Registry[Layout] = Registry("layout", "svdserve.layouts", Layout)  # type: ignore[type-abstract]
PAIR, INTERPOLATIVE = Pair(), Interpolative()
for _layout in (PAIR, INTERPOLATIVE):
    LAYOUTS.add(_layout.name, _layout)


def get_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    return LAYOUTS.get_known(name)


__all__ = ["INTERPOLATIVE", "LAYOUTS", "PAIR", "Factors", "InputShare", "Layout", "get_layout"]
