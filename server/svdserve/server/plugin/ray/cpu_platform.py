"""vLLM's CPU platform for its Ray executor; platform.py says when it is chosen."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, whose workers each take one "GPU" of a Ray node."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """vLLM's hook: the class that sums and sends tensors between workers."""
        # By name: its module needs the platform that is being chosen now.
        return "svdserve.server.plugin.ray.communicator.RayCpuCommunicator"
