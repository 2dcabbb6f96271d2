"""Communication between the workers of Ray nodes without a GPU (see platform.py)."""

import socket

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class RayCpuCommunicator(CpuCommunicator):  # type: ignore[misc]
    """vLLM's CPU communicator, which here uses shared memory within one node only.

    vLLM 0.32 uses it whenever all workers give that memory the same name. The name holds the port
    of the job but no host, so workers on different machines give it the same name too, and then
    wait forever.
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
        nodes: list[object] = [None] * self.world_size
        mine = (socket.gethostname(), node)
        torch.distributed.all_gather_object(nodes, mine, group=self.device_group)
        return len(set(nodes)) == 1 and super()._all_group_ranks_share_shm_group_name()
