"""The command line: one function a command, everything heavy imported when it runs."""

import svdserve.server  # noqa: F401 (hides broken packages, which a spawned child must do first)
