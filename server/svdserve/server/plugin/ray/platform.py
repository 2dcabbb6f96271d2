"""Lets vLLM's Ray executor run on machines without a GPU.

The executor reserves one unit of a Ray resource for each worker and asks the platform for the
resource's name; vLLM's CPU platform has none and is refused (vllm/v1/executor/ray_utils.py). Where
Ray is installed this platform takes its place: the same, with Ray's "GPU" as the unit, because Ray
tells an actor which units it holds of its built-in resources only. Every node thus says how many
workers it takes with ``ray start --num-gpus``.

vLLM finds ``platform`` through the entry point ``vllm.platform_plugins`` in every process that it
starts, Ray's workers included, and calls it before any other plug-in.
"""

from importlib.metadata import entry_points
from importlib.util import find_spec

GROUP = "vllm.platform_plugins"
_REPLACED = "vllm.platforms.cpu.CpuPlatform"


def platform() -> str | None:
    """The class that takes the place of vLLM's CPU platform; None leaves vLLM's choice alone.

    Never raises, and imports vLLM only where there is Ray, so that no other start depends on it.
    """
    # vLLM refuses two platforms from outside, and a vendor's is the better one.
    if find_spec("ray") is None or any(e.value != _ENTRY for e in entry_points(group=GROUP)):
        return None
    try:
        from vllm.platforms import cpu_platform_plugin

        if cpu_platform_plugin() != _REPLACED:
            return None  # a GPU, or a vendor's own CPU platform
        from svdserve.server.plugin.ray.cpu_platform import RayCpuPlatform
    except Exception:
        return None  # a vLLM that svdserve does not fit, which plugin.py tells
    return f"{RayCpuPlatform.__module__}.{RayCpuPlatform.__qualname__}"


_ENTRY = f"{__name__}:{platform.__name__}"
