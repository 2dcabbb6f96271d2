"""Serving on vLLM: the plug-in, the HTTP server, its metrics and the benchmark."""

import os
import sys

# cpu_install.work_around names here what the children of a server must not import. It is read on
# import of this package because that is the first thing a spawned child does.
HIDDEN_PACKAGES = "SVDSERVE_HIDDEN_PACKAGES"


def hide_packages() -> None:
    """Make Python, and so transformers, believe that the named packages are not installed."""
    for name in filter(None, os.environ.get(HIDDEN_PACKAGES, "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]


hide_packages()
