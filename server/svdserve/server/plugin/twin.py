"""What a model class of vLLM does to weights while it loads them, learned from a dense twin.

svdserve reads factors itself and bypasses the model's own ``load_weights``, where some classes
rearrange weights: Llama 4 permutes the rows of q and k. The twin is the same class without
quantization and with its parameters on the meta device. One of its linears at a time gets memory,
the model's own code loads weights into it, and the result shows what the code did to them.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import initialize_model

from svdserve.compression.format.reader import Checkpoint
from svdserve.compression.system.errors import UserError
from svdserve.server.plugin.linear import LowRankLinearMethod


class Twin:
    """The dense model of a vLLM configuration, without memory for its parameters.

    Args:
        vllm_config: of the model that is served; it is not changed.
        prefix: of the names of the model's modules.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = copy.copy(vllm_config)
        config.quant_config = None
        # Attention layers register here by name, and the served model's have done so already.
        config.compilation_config = copy.copy(vllm_config.compilation_config)
        config.compilation_config.static_forward_context = {}
        config.compilation_config.static_all_moe_layers = []
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("meta"):
                self.model: nn.Module = initialize_model(config, prefix=prefix)
        finally:
            torch.set_default_dtype(before)

    def loaded(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The weight [m, n] of this TP rank's linear ``name`` after the model has loaded it.

        Args:
            name: of the vLLM layer.
            weights: of its linears, by their names in the checkpoint; float32.

        Raises:
            UserError: the model's code does not load them into that linear.
        """
        layer = self.model.get_submodule(name)
        with _in_memory(layer) as weight:
            try:
                self.model.load_weights(weights.items())  # type: ignore[operator]
            except Exception as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    self._refusal(name, f"its code cannot load it alone ({first})")
                ) from None
            if bool(weight.isnan().any()):
                raise UserError(self._refusal(name, "its code loads other tensors into it"))
            return weight.detach().clone()

    def row_map(
        self, name: str, method: LowRankLinearMethod, checkpoint: Checkpoint
    ) -> list[Tensor] | None:
        """For each linear of a layer the rows of its weight that this TP rank holds, in order.

        None means the rows that the layer takes by itself (``plain_rows``).

        Raises:
            UserError: the model does more to the weight than rearrange its rows.
        """
        layer = self.model.get_submodule(name)
        assert isinstance(layer, LinearBase)
        sizes = method.full_sizes(layer, checkpoint)
        names = [linear for part in method.parts for linear in part.linears]
        columns, start, probes = method.input_size, 0, {}
        for linear, rows in zip(names, sizes, strict=True):
            ids = torch.arange(start, start + rows, dtype=torch.float32)
            probes[f"{linear}.weight"] = ids[:, None].expand(rows, columns)
            start += rows
        found = self.loaded(name, probes)
        probes = {
            key: torch.arange(columns, dtype=torch.float32).expand(len(probe), columns)
            for key, probe in probes.items()
        }
        across = self.loaded(name, probes)
        wanted = torch.arange(method.channels.start, method.channels.stop, dtype=torch.float32)
        rows_found = found[:, 0]
        if not torch.equal(found, rows_found[:, None].expand_as(found)) or not torch.equal(
            across, wanted.expand_as(across)
        ):
            raise UserError(self._refusal(name, "its code changes the weight while it loads it"))
        maps, begin = [], 0
        for block, rows in zip(torch.split(rows_found, method.output_sizes), sizes, strict=True):
            local = block.long() - begin
            whole = torch.equal(block, block.round())
            if not whole or int(local.min()) < 0 or int(local.max()) >= rows:
                raise UserError(self._refusal(name, "its code mixes the rows of several linears"))
            maps.append(local)
            begin += rows
        plain = method.plain_rows(layer, sizes)
        same = all(torch.equal(a, b) for a, b in zip(maps, plain, strict=True))
        return None if same else maps

    def _refusal(self, name: str, reason: str) -> str:
        return (
            f"{name}: {type(self.model).__name__} of vLLM cannot serve this layer factored: "
            f"{reason}; serve the dense model, or report the architecture"
        )


def kind_of(name: str, method: LowRankLinearMethod) -> str:
    """A text that is equal for layers which differ only in the number of their block."""
    shapes = f"{method.input_size} {method.output_sizes}"
    members = [part.linears for part in method.parts]
    return re.sub(r"\.\d+\.", ".#.", f"{name} {shapes} {members}")


@contextmanager
def _in_memory(layer: LinearBase) -> Iterator[Tensor]:
    """Make the layer's weight float32 NaN on the CPU for a while; loaders can write into it."""
    empty = layer._parameters["weight"]
    weight = torch.full(empty.shape, torch.nan, dtype=torch.float32, device="cpu")
    # The loaders are methods of the parameter's class and read its attributes.
    parameter = torch.Tensor._make_subclass(type(empty), weight, False)
    parameter.__dict__.update(empty.__dict__)
    layer._parameters["weight"] = parameter
    try:
        yield parameter
    finally:
        layer._parameters["weight"] = empty
