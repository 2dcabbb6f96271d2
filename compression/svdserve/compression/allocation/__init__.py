"""Allocators, which choose each module's rank r under one budget; importing registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from svdserve.compression.allocation.registry import (
    ALLOCATORS,
    Allocator,
    Budget,
    Module,
    Ranks,
    get_allocator,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["ALLOCATORS", "Allocator", "Budget", "Module", "Ranks", "get_allocator"]
