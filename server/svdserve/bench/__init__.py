"""Benchmarks of engines, servers and single layers, with tables and figures of the results."""

import svdserve.server  # noqa: F401 (hides broken packages, which a spawned child must do first)
