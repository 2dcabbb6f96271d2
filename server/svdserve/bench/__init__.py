"""What serving costs: engines, servers and single layers, measured and drawn."""

import svdserve.server  # noqa: F401 (hides broken packages, which a spawned child must do first)
