"""Layouts define how a weight of rank r is stored in matrices and indices; each has its own file.

``LAYOUTS`` holds them by name. An installed package adds a layout by an entry point of the group
``svdserve.layouts``.
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
        UserError: no layout has this name; the message lists all names.
    """
    return LAYOUTS.get_known(name)


__all__ = ["INTERPOLATIVE", "LAYOUTS", "PAIR", "Factors", "InputShare", "Layout", "get_layout"]
