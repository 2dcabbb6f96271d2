"""Permissions that the user has granted beyond the strict defaults.

They are environment variables, so that child processes such as vLLM's workers inherit them. The
command line sets them with ``--trust-remote-code`` and ``--allow-links``.
"""

import os
from typing import Any

REMOTE_CODE = "SVDSERVE_TRUST_REMOTE_CODE"
LINKS = "SVDSERVE_ALLOW_LINKS"


def allow(variable: str) -> None:
    """Grant a permission to this process and to those that it starts."""
    os.environ[variable] = "1"


def links_allowed() -> bool:
    """Whether links in a model directory may point outside it."""
    return os.environ.get(LINKS) == "1"


def remote_code() -> dict[str, Any]:
    """``trust_remote_code`` for transformers' ``from_pretrained``, always set explicitly.

    If the argument is missing, transformers asks on the terminal.
    """
    return {"trust_remote_code": os.environ.get(REMOTE_CODE) == "1"}
