"""The command line: one function for each command, which imports heavy modules when it runs."""

import svdserve.server  # noqa: F401 (hides broken packages, which a spawned child must do first)
