"""The platform that ray_platform.py names; apart from it because it imports torch and vLLM."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, whose workers each take one "GPU" of a Ray node."""

    ray_device_key = "GPU"
