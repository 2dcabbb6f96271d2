"""Lets vLLM's Ray executor run on machines without a GPU.

The executor reserves one unit of a Ray resource for each worker and asks the platform for the
resource's name; vLLM's CPU platform has none and is refused (vllm/v1/executor/ray_utils.py). If Ray
is installed, this platform takes its place. It differs only in that Ray's "GPU" is its unit,
because Ray tells an actor which units it holds for built-in resources only. Every node therefore
says by ``ray start --num-gpus`` how many workers it takes.

vLLM finds ``platform`` through the entry point ``vllm.platform_plugins`` in every process that it
starts, Ray's workers included, and calls it before any other plug-in.
"""

from importlib.metadata import entry_points
from importlib.util import find_spec

GROUP = "vllm.platform_plugins"
_REPLACED = "vllm.platforms.cpu.CpuPlatform"


def platform() -> str | None:
    """The class that takes the place of vLLM's CPU platform; None leaves vLLM's choice alone.

    It never raises, and imports vLLM only if Ray is installed, so that no other start depends on
    it.
    """
    # vLLM refuses two platforms from plug-ins, and a vendor's is the better choice.
    if find_spec("ray") is None or any(e.value != _ENTRY for e in entry_points(group=GROUP)):
        return None
    try:
        from vllm.platforms import cpu_platform_plugin

        if cpu_platform_plugin() != _REPLACED:
            return None  # a GPU, or a vendor's own CPU platform
        from svdserve.server.plugin.ray.cpu_platform import RayCpuPlatform
    except Exception:
        return None  # svdserve does not fit this vLLM; plugin.py says so
    return f"{RayCpuPlatform.__module__}.{RayCpuPlatform.__qualname__}"


_ENTRY = f"{__name__}:{platform.__name__}"
