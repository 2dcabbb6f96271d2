"""Serving on vLLM: the plug-in, the HTTP server and its metrics."""

import os
import sys

# cpu_install.work_around lists in this variable what a server's child processes must not import.
# The package reads it on import, because importing it is the first thing that a spawned child does.
HIDDEN_PACKAGES = "SVDSERVE_HIDDEN_PACKAGES"


def hide_packages() -> None:
    """Make Python, and so transformers, believe that the named packages are not installed."""
    for name in filter(None, os.environ.get(HIDDEN_PACKAGES, "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]


hide_packages()
