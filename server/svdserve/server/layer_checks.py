"""What `svdserve verify` and `svdserve serve --verify` found out about each factored layer.

The workers compare the layers (plugin/verify.py); the command and the API process judge the results
without importing vLLM.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from svdserve.compression.system.errors import UserError

VERIFY = "SVDSERVE_VERIFY"
"""The environment variable whose value 1 makes the loader verify what it has loaded."""


@dataclass(frozen=True)
class LayerCheck:
    """Relative error of one layer's outputs, and what is allowed.

    The error is that of all outputs, or a fifth of the worst output channel's error if that is
    larger, so that one wrong row of a large weight is found too. The error of a channel is relative
    to the norm of the channel or to that of the mean channel, whichever is larger.
    """

    name: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


def wanted() -> bool:
    """Whether the layers are to be verified once they are loaded."""
    return os.environ.get(VERIFY) == "1"


def require_right(checks: Sequence[LayerCheck]) -> None:
    """Raise UserError that names the worst layer, if one is wrong on any TP rank."""
    wrong = [check for check in checks if not check.right]
    if wrong:
        worst = max(wrong, key=lambda check: check.error)
        count, of = (len({check.name for check in some}) for some in (wrong, checks))
        raise UserError(
            f"{count} of {of} factored layers give other outputs than their weights: "
            f"{worst.name} is off by {worst.error:.3g}, allowed is {worst.allowed:g}; do not serve "
            "this model on this machine, and report the fault"
        )
