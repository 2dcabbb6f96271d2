"""SVD methods; each paper has its own file. Importing this package registers all methods."""

from importlib import import_module
from pkgutil import iter_modules

from svdserve.compression.methods.registry import (
    METHODS,
    Method,
    Solution,
    get_method,
    markdown_table,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "Solution", "get_method", "markdown_table"]
