"""Lets vLLM's Ray executor run on machines without a GPU.

The executor reserves one unit of a Ray resource for each worker and asks the platform for the
resource's name; vLLM's CPU platform has none and is refused (vllm/v1/executor/ray_utils.py). Where
Ray is installed this platform takes its place: the same, with Ray's built-in "GPU" as the unit,
because Ray tells an actor which units it holds of its built-in resources only. Every node thus says
how many workers it takes with ``ray start --num-gpus``.

vLLM finds ``platform`` through the entry point ``vllm.platform_plugins`` in every process that it
starts, Ray's workers included, before the plug-in of plugin.py.
"""

from importlib.util import find_spec

CPU_PLATFORM = "vllm.platforms.cpu.CpuPlatform"


def platform() -> str | None:
    """The class that takes the place of vLLM's CPU platform; None leaves vLLM's choice alone."""
    if find_spec("ray") is None:
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() != CPU_PLATFORM:  # A GPU, or a vendor's own CPU platform.
        return None
    return "svdserve.server.ray_cpu.RayCpuPlatform"
