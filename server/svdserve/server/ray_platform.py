"""Lets vLLM's Ray executor run on machines without a GPU.

The executor reserves one unit of a Ray resource for each worker and asks the platform for the
resource's name; vLLM's CPU platform has none and is refused (vllm/v1/executor/ray_utils.py). Where
Ray is installed this platform takes its place: the same, with Ray's "GPU" as the unit, because Ray
tells an actor which units it holds of its built-in resources only. Every node thus says how many
workers it takes with ``ray start --num-gpus``.

vLLM finds ``platform`` through the entry point ``vllm.platform_plugins`` in every process that it
starts, Ray's workers included, and calls it before any other plug-in.
"""

from importlib.util import find_spec

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, whose workers each take one "GPU" of a Ray node."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """vLLM's hook: the class that sums and sends tensors between workers."""
        # By name: its module needs the platform that is being chosen now.
        return "svdserve.server.ray_communicator.RayCpuCommunicator"


def platform() -> str | None:
    """The class that takes the place of vLLM's CPU platform; None leaves vLLM's choice alone."""
    chosen = cpu_platform_plugin()
    if chosen != f"{CpuPlatform.__module__}.{CpuPlatform.__qualname__}" or find_spec("ray") is None:
        return None  # A GPU, a vendor's own CPU platform, or no Ray.
    return f"{__name__}.{RayCpuPlatform.__qualname__}"
