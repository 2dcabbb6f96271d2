"""What the user has allowed beyond the strict defaults.

Environment variables, so that the processes below a command (vLLM's workers) are told too. The
command line sets them by ``--trust-remote-code`` and ``--allow-links``.
"""

import os
from typing import Any

REMOTE_CODE = "SVDSERVE_TRUST_REMOTE_CODE"
LINKS = "SVDSERVE_ALLOW_LINKS"


def allow(variable: str) -> None:
    """Grant a permission to this process and to those that it starts."""
    os.environ[variable] = "1"


def links_allowed() -> bool:
    """Whether links may lead out of a model directory."""
    return os.environ.get(LINKS) == "1"


def remote_code() -> dict[str, Any]:
    """The argument of transformers' ``from_pretrained`` functions: True, or False.

    Where it is left out transformers asks on the terminal.
    """
    return {"trust_remote_code": os.environ.get(REMOTE_CODE) == "1"}
