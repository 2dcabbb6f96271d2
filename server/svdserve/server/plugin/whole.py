"""Linears and output heads that are not factored, by svdserve's kernel where it was measured.

vLLM loads their weights as ever and packs them for its own products afterwards. Between the two
``use_kernel`` replaces the methods of the layers, so that each weight is packed once, for the
kernel. An output head keeps its weight beside the packed one, as in vLLM, because the embedding may
be tied to it.

Interfaces: UnquantizedLinearMethod in vllm/model_executor/layers/linear.py and
UnquantizedEmbeddingMethod in vllm/model_executor/layers/vocab_parallel_embedding.py.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from svdserve.kernels import Activation, WholePart, prepare
from svdserve.kernels.registry import Request
from svdserve.server.plugin.products import fused_kernel, fuses_activation


class _ByKernel:
    """y = W x + b by svdserve's kernel; the part of both methods that differs from vLLM's.

    Attributes:
        activation: what to apply to the outputs; set before the weight is packed.
    """

    def __init__(self, request: Request, kernel: str) -> None:
        super().__init__()
        self.activation: Activation | None = None
        self._request, self._kernel = request, kernel
        self._product: Callable[..., Tensor] | None = None

    def fuses(self, layer: nn.Module, activation: Activation) -> bool:
        """Whether the kernel can apply the activation of a gated MLP to the layer's outputs."""
        del layer
        return fuses_activation(self._request, activation)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the loaded weight."""
        weight = WholePart(layer.weight.data)
        layer.product = prepare([weight], activation=self.activation, implementation=self._kernel)
        self._product = layer.product.forward

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [.., m] of x [.., n], for the m and n of this TP rank; [.., m / 2] if activated."""
        del layer
        assert self._product is not None
        return self._product(x, bias)


class WholeLinearMethod(_ByKernel, UnquantizedLinearMethod):  # type: ignore[misc]
    """The method of a linear layer that is not factored."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Pack the loaded weight and free it; an empty one stays, which LoRA and MLA read."""
        super().process_weights_after_loading(layer)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


class WholeHeadMethod(_ByKernel, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The method of an output head, and of an embedding, which a model may also use as its head."""


_METHODS: dict[type, type[WholeLinearMethod | WholeHeadMethod]] = {
    UnquantizedLinearMethod: WholeLinearMethod,
    UnquantizedEmbeddingMethod: WholeHeadMethod,
}


def use_kernel(model: nn.Module) -> int:
    """Let svdserve's kernel compute the layers that it can; call this before vLLM packs weights.

    Returns:
        The number of these layers.
    """
    count = 0
    for layer in model.modules():
        method = _METHODS.get(type(getattr(layer, "quant_method", None)))
        # vLLM's own packing leaves the layers with this mark alone, too.
        if method is None or getattr(layer, "_cpu_skip_gemm_dispatch", False):
            continue
        request = _request(getattr(layer, "weight", None))
        kernel = fused_kernel(request) if request else None
        if request and kernel:
            layer.quant_method = method(request, kernel)
            count += 1
    return count


def _request(weight: object) -> Request | None:
    if not isinstance(weight, Tensor) or weight.ndim != 2:  # a convolution that is a linear layer
        return None
    columns = (0, weight.shape[1])
    device, dtype = weight.device.type, weight.dtype
    return Request(device, dtype, columns, prepared=True, whole=True)
