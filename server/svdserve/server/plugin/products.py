"""What computes a low-rank layer: svdserve's fused kernels, or else vLLM's products."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

from svdserve.compression.format.codecs import Codec
from svdserve.compression.system.errors import UserError
from svdserve.kernels import Activation, Int8Matrix, Int8Part, NoImplementation, Part
from svdserve.kernels.parts import AnyPart
from svdserve.kernels.registry import (
    IMPLEMENTATIONS,
    OVERRIDE,
    Request,
    asked_for,
    choose,
    reasons_against,
)
from svdserve.server.plugin.shares import LowRankShare, Matrix

logger = init_logger(__name__)


def fused_kernel(request: Request) -> str | None:
    """The kernel of svdserve for such weights; None if vLLM's own products are to run.

    Raises:
        UserError: SVDSERVE_KERNEL names a kernel that cannot compute them.
    """
    reasons = reasons_against(request)
    if request.weights == "int8" or request.whole:
        return _optional_kernel(request, reasons)
    try:
        chosen = choose(request).name
    except NoImplementation as error:
        raise UserError(str(error)) from None
    if chosen != "torch":
        return chosen
    if request.parts == 1:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        logger.info_once("Factors run as two products: %s", why or "SVDSERVE_KERNEL=torch")
    return None


def _optional_kernel(request: Request, reasons: Mapping[str, str]) -> str | None:
    """The kernel for weights that vLLM has products for: int8, or not factored."""
    asked, known = asked_for(), [one.name for one in IMPLEMENTATIONS]
    if asked not in (None, *known):
        raise UserError(f"{OVERRIDE}={asked} is not known; give one of {', '.join(known)}")
    chosen = [name for name in known if name not in reasons and asked in (None, name)]
    if not chosen and request.parts == 1:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        kind = "Int8 weights" if request.weights == "int8" else "Weights that are not factored"
        logger.info_once("%s run as vLLM's products: %s", kind, why or f"{OVERRIDE}={asked}")
    return chosen[0] if chosen else None


def fuses_activation(request: Request, activation: Activation) -> bool:
    """Whether the kernel of ``fused_kernel`` can apply the activation of a gated MLP too.

    Raises:
        UserError: SVDSERVE_KERNEL names a kernel that cannot compute the request.
    """
    kernel = fused_kernel(request)
    return kernel is not None and kernel not in reasons_against(
        replace(request, activation=activation)
    )


def kernel_part(layer: LinearBase, share: LowRankShare, ordered_input: bool) -> AnyPart:
    """The factors as a kernel's part, on the layer's device; floats in its dtype.

    ``ordered_input`` says that the pivots come first among the inputs.
    """
    passing, order = len(share.inputs.slots), share.inputs.order
    pivots = None
    if passing:
        assert order is not None
        pivots = torch.arange(passing) if ordered_input else order[:passing]
        pivots = pivots.to(layer.weight.device)
    inner, outer = (kernel_matrix(layer, matrix) for matrix in (share.inner, share.outer))
    if isinstance(inner, Int8Matrix) and isinstance(outer, Int8Matrix):
        return Int8Part(inner, outer, pivots)
    assert isinstance(inner, Tensor)
    assert isinstance(outer, Tensor)
    return Part(inner, outer, pivots)


def kernel_matrix(layer: LinearBase, matrix: Matrix) -> Tensor | Int8Matrix:
    """A matrix as kernels take it, on the layer's device; floats in its dtype."""
    if matrix.codec.product == "int8":
        return Int8Matrix(*_own_int8(layer, matrix))
    return own(matrix.decoded(layer.weight.dtype), layer)


def _own_int8(layer: LinearBase, matrix: Matrix) -> tuple[Tensor, Tensor]:
    values, scale = matrix.tensors[""], matrix.tensors["_scale"]
    return own(values, layer, torch.int8), own(scale, layer, torch.float32)


class Product(nn.Module):
    """y = W x + b by vLLM's own dense linear method.

    Each factor thus runs as a dense layer would on the same device: on CPU by oneDNN from a packed
    copy (the unpacked one is freed at once), elsewhere by the configured backend.
    """

    def __init__(
        self, method: UnquantizedLinearMethod, weight: Tensor, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # packing for AMX widens it to float32 in place
        self.shape = weight.shape
        self.stored_bytes = weight.nbytes
        self.method = method
        method.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(self, x, bias)  # type: ignore[no-any-return]


def int8_kernel(dtype: torch.dtype) -> Int8ScaledMMLinearKernel:
    """vLLM's kernel for int8 weights with a scale for each row, and activations of ``dtype``.

    The kernel rounds the activations to int8 too: symmetrically, with a scale that it computes for
    each token.

    Raises:
        UserError: vLLM has no such kernel for this device or dtype.
    """
    # Checked here, because vLLM's kernels for CUDA would fail only at the first token.
    if current_platform.is_cuda() and not current_platform.has_device_capability(75):
        raise UserError(
            "int8 weights need a GPU of compute capability 7.5 or higher; compress without "
            "--weights int8"
        )
    if dtype == torch.float32 and not current_platform.is_cpu():
        raise UserError(
            "int8 weights cannot be served in float32 on this device; add --dtype bfloat16"
        )
    try:
        return init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="svdserve",
        )
    except ValueError as error:
        raise UserError(
            "vLLM has no int8 linear kernel for this device; compress without --weights int8 "
            f"({' '.join(str(error).split())})"
        ) from None


class Int8Product(nn.Module):
    """y = W x + b for an int8 W [m, n] with scales [m], by vLLM's own int8 kernel."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        self.stored_bytes = weight.nbytes + scale.nbytes
        # vLLM's kernels read these attributes by name.
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale[:, None], requires_grad=False)
        self.input_scale = self.input_zero_point = self.azp_adj = None
        self.logical_widths = [weight.shape[0]]
        self.bias = bias
        self.kernel = kernel = int8_kernel(dtype)
        on_cpu = isinstance(kernel, CPUInt8ScaledMMLinearKernel)
        if on_cpu and (dtype != torch.bfloat16 or weight.shape[0] % 32):
            # vLLM 0.32 would give these to its AMX operation too, which cannot compute them.
            kernel.process_weights_for_onednn(self)
            kernel.linear_method = kernel._apply_weights_onednn
        else:
            kernel.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.kernel.apply_weights(self, x, bias)  # type: ignore[no-any-return]


class LowRankProduct(nn.Module):
    """y = W x + b by the factors of one part; x [.., n] holds this TP rank's input channels."""

    order: Tensor | None

    def __init__(
        self,
        inner: Product | Int8Product | None,
        outer: Product | Int8Product,
        order: Tensor | None,
        slots: range,
        reduce: bool,
    ) -> None:
        """Compose the two products.

        Args:
            inner: V, or Z for the channels that are no pivots; None if all channels are pivots.
            outer: U or C.
            order: the channels of x (int64), pivots first, then the others; None if x comes in
                that order, and for ``pair``.
            slots: the places in z of this TP rank's pivots; empty for ``pair``.
            reduce: whether z is a partial sum, to be summed over the TP ranks.
        """
        super().__init__()
        self.inner = inner
        self.outer = outer
        self.register_buffer("order", order, persistent=False)
        self.stored_bytes = outer.stored_bytes + (inner.stored_bytes if inner else 0)
        self.first_slot = slots.start
        self.pivots = len(slots)
        self.rank = outer.shape[1]
        self.reduce = reduce

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        z = self._project(x)
        if self.reduce:
            z = tensor_model_parallel_all_reduce(z)
        return self.outer(z, bias)  # type: ignore[no-any-return]

    def _project(self, x: Tensor) -> Tensor:
        if self.order is not None:
            # On CPU gather is 2 to 4 times faster than index_select along the last dimension.
            x = x.gather(-1, self.order.expand(*x.shape[:-1], -1))
        if self.inner is None:
            z = x.new_zeros(*x.shape[:-1], self.rank)
        elif self.pivots == 0:
            return self.inner(x)  # type: ignore[no-any-return]
        else:
            z = self.inner(x.narrow(-1, self.pivots, x.shape[-1] - self.pivots))
        z.narrow(-1, self.first_slot, self.pivots).add_(x.narrow(-1, 0, self.pivots))
        return z


def check_product(codec: Codec, dtype: torch.dtype) -> None:
    """Check, before weights are read, that this device can multiply matrices of the codec.

    Raises:
        UserError: it cannot, for activations of ``dtype``.
    """
    if codec.product == "int8":
        int8_kernel(dtype)


def product(
    layer: LinearBase, matrix: Matrix, bias: nn.Parameter | None = None
) -> Product | Int8Product:
    """The product with a matrix: by vLLM's kernel for its codec, or of the decoded matrix."""
    dtype = layer.weight.dtype
    if matrix.codec.product == "int8":
        return Int8Product(*_own_int8(layer, matrix), dtype, bias)
    return Product(UnquantizedLinearMethod(), own(matrix.decoded(dtype), layer), bias)


def own(weight: Tensor, layer: LinearBase, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the layer's device, independent of the mapped file.

    It has the layer's dtype, unless another is given.
    """
    target = layer.weight
    owned = torch.empty(weight.shape, dtype=dtype or target.dtype, device=target.device)
    return owned.copy_(weight)
