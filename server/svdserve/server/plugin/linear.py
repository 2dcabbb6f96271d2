"""Low-rank and encoded linear layers of vLLM: creation, loading, tensor parallelism, forward pass.

A layer [m, n] has one or more parts (layer_parts.py). Each factored part is two products around
the latent z: y = C (x[pivots] + Z x[rest]), or y = U (V x). A layer factored as a whole, such as
a shared qkv_proj, therefore costs two products, or one fused operation if svdserve.kernels has
one for the device and dtype. On a GPU one fused operation may compute several parts.

Tensor parallelism. A column-parallel layer has its TP rank's rows of factor_out and all of
factor_in, since every TP rank needs all of z. A row-parallel layer has its TP rank's input
channels: columns of factor_in, and the pivots among these channels. They give a partial z, and
z [.., r] is all-reduced in place of y [.., m], which is fewer bytes. Every TP rank then holds the
whole y.

Codecs. Matrices in int8 go through svdserve's fused kernel too where it was measured, or else
through vLLM's own int8 kernels, one for each product. Both round the products' inputs to int8 as
well, the fused kernel in groups of 64 channels, vLLM's with one scale for a token. In a
row-parallel layer each TP rank scales its inputs by their own maximum, and its share of the
weight's rows by the scales of the whole rows. Matrices of other codecs are decoded when they are
loaded.

Gathering the pivots of x costs most at down_proj, which has the most inputs. mlp.py says how this
cost is avoided, and when gate_up_proj takes over the activation.

Interface: LinearMethodBase in vllm/model_executor/layers/linear.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
)

from svdserve.compression.format.layouts import get_layout
from svdserve.compression.format.reader import Checkpoint
from svdserve.compression.system.errors import UserError
from svdserve.kernels import Activation, WholePart, prepare
from svdserve.kernels.parts import AnyPart
from svdserve.kernels.registry import Request
from svdserve.server.plugin.layer_parts import LayerPart
from svdserve.server.plugin.products import (
    LowRankProduct,
    check_product,
    fused_kernel,
    fuses_activation,
    kernel_matrix,
    kernel_part,
    product,
)
from svdserve.server.plugin.shares import LowRankShare, read_factors, read_whole

logger = init_logger(__name__)


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of weights on this TP rank.

    Attributes:
        lowrank: of the factors.
        dense: of the weights that are not factored.
        dense_equivalent: of all of these weights if none were factored.
    """

    lowrank: int = 0
    dense: int = 0
    dense_equivalent: int = 0

    def __add__(self, other: "StoredBytes") -> "StoredBytes":
        return StoredBytes(
            self.lowrank + other.lowrank,
            self.dense + other.dense,
            self.dense_equivalent + other.dense_equivalent,
        )


class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The method of one layer; svdserve's model loader calls ``load``.

    Attributes:
        parts: how the checkpoint stores the layer.
        stored: bytes on this TP rank, None until loaded.
        row_map: for each linear the rows that this TP rank holds; None if the model's own loading
            rearranges none.
    """

    def __init__(self, prefix: str, parts: tuple[LayerPart, ...]) -> None:
        self.prefix = prefix
        self.parts = parts
        self.stored: StoredBytes | None = None
        self.row_map: list[Tensor] | None = None
        self._product: Callable[..., Tensor] | None = None  # set if one product is the whole layer

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Check the geometry and take over the all-reduce; weights come with ``load``.

        Raises:
            UserError: the checkpoint's sizes do not fit the layer or the number of TP ranks, or
                this device cannot multiply the weights' codec.
        """
        del output_size, extra_weight_attrs
        for part in self.parts:
            check_product(part.codec, params_dtype)
        self.input_size = input_size
        start = layer.tp_rank * input_size_per_partition
        sharded = input_size_per_partition != input_size
        self.channels = (
            range(start, start + input_size_per_partition) if sharded else range(input_size)
        )
        self.output_sizes = list(output_partition_sizes)
        self._check_geometry(input_size, layer.tp_size)
        # A layer whose caller sums the outputs (reduce_results off) must give a partial sum of y.
        # So must a layer that may get LoRA adapters, as vLLM adds a TP rank's share of the
        # adapters' outputs before the sum.
        adapters = get_current_vllm_config().lora_config is not None
        reduces = sharded and layer.tp_size > 1 and layer.reduce_results and not adapters
        self.all_reduces_latent = reduces and self.parts[0].spec is not None
        if self.all_reduces_latent:
            layer.reduce_results = False
        # vLLM's code for LoRA and MLA reads the device of layer.weight, so an empty one is kept.
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)

    def _check_geometry(self, input_size: int, tp_size: int) -> None:
        outputs = sum(part.outputs for part in self.parts)
        if outputs != len(self.output_sizes):
            raise UserError(
                f"{self.prefix}: vLLM merges {len(self.output_sizes)} linears here, but the "
                f"checkpoint lists {outputs}; serve the dense model, or load this one with "
                "transformers"
            )
        local = iter(self.output_sizes)
        for part in self.parts:
            sizes = list(islice(local, part.outputs))
            if part.spec is None:
                continue
            if part.spec.in_features != input_size:
                raise UserError(
                    f"{part.names[0]} has {part.spec.in_features} inputs, but the model's layer "
                    f"has {input_size}; the checkpoint belongs to another configuration"
                )
            for full, size in zip(part.spec.out_features, sizes, strict=True):
                if full % size or tp_size % (full // size):
                    raise UserError(
                        f"{part.names[0]} has {full} outputs, which do not fit {size} outputs on "
                        f"each of {tp_size} TP rank(s); the checkpoint belongs to another "
                        "configuration"
                    )

    def plain_rows(self, layer: LinearBase, full: Sequence[int]) -> list[Tensor]:
        """For each linear the rows that this TP rank holds if the model rearranges nothing.

        A linear with fewer shards than there are TP ranks (key and value heads, replicated layers)
        is repeated on consecutive TP ranks, as in QKVParallelLinear.weight_loader.

        Args:
            layer: whose method this is.
            full: rows of each linear's whole weight.
        """
        found = []
        for rows, size in zip(full, self.output_sizes, strict=True):
            start = layer.tp_rank // (layer.tp_size * size // rows) * size
            found.append(torch.arange(start, start + size))
        return found

    def checkpoint_names(self) -> set[str]:
        """The tensors of the checkpoint that ``load`` reads."""
        return {
            f"{name}.{suffix}"
            for part in self.parts
            for name in part.names
            for suffix in part.suffixes
        }

    def input_order(self, checkpoint: Checkpoint) -> Tensor | None:
        """The order (int64) of this TP rank's input channels that needs no gather, or None.

        None means that the layer takes its inputs in their own order, or has several parts.
        """
        spec = self.parts[0].spec
        if len(self.parts) > 1 or spec is None:
            return None
        layout, module = get_layout(spec.layout), self.parts[0].names[0]
        if layout.decoded_when_served:
            return None
        indices = {suffix: checkpoint.block(module, suffix) for suffix in layout.indices}
        return layout.input_share(indices, spec.in_features, self.channels).order

    def load(
        self,
        layer: LinearBase,
        checkpoint: Checkpoint,
        *,
        row_order: Tensor | None = None,
        ordered_input: bool = False,
        activation: Activation | None = None,
    ) -> StoredBytes:
        """Read this TP rank's share of the layer and bring it into the form that ``apply`` uses.

        The parts that one kernel computes (mostly one part) are packed before the next are read, so
        that few unpacked weights exist at a time.

        Args:
            layer: whose method this is.
            checkpoint: the files.
            row_order: the order in which every member's outputs are to come; the layer must have no
                bias.
            ordered_input: whether the inputs come in ``input_order``.
            activation: what to apply to the outputs; the layer must be one that ``fuses`` it.

        Returns:
            The bytes that the TP rank now stores, also kept as ``stored``.

        Raises:
            UserError: a dense member is missing or of another shape than the layer's.
        """
        bias = layer.bias if len(self.parts) == 1 else None
        local = iter(self.output_sizes)
        rows = iter(self._rows(layer, checkpoint, row_order))
        stored = StoredBytes()
        products: list[nn.Module] = []
        together = self._kernel(layer, self.parts) is not None
        for batch in [self.parts] if together else [(part,) for part in self.parts]:
            kernel = self._kernel(layer, batch)
            ready: list[AnyPart] = []
            for part in batch:
                sizes = list(islice(local, part.outputs))
                mine = list(islice(rows, part.outputs))
                equivalent = sum(sizes) * len(self.channels) * layer.weight.element_size()
                stored += StoredBytes(dense_equivalent=equivalent)
                if part.spec is None:
                    matrix = read_whole(checkpoint, part, mine, self.channels)
                    if kernel is not None:
                        ready.append(WholePart(kernel_matrix(layer, matrix)))
                        continue
                    dense = product(layer, matrix, bias)
                    stored += StoredBytes(dense=dense.stored_bytes)
                    products.append(dense)
                    continue
                share = read_factors(checkpoint, part, mine, self.channels)
                if kernel is not None:
                    ready.append(kernel_part(layer, share, ordered_input))
                    continue
                lowrank = self._lowrank(layer, share, bias, ordered_input)
                stored += StoredBytes(lowrank=lowrank.stored_bytes)
                products.append(lowrank)
            if kernel is not None:
                fused = prepare(ready, activation=activation, implementation=kernel)
                nbytes = fused.stored_bytes
                whole = batch[0].spec is None
                stored += StoredBytes(dense=nbytes) if whole else StoredBytes(lowrank=nbytes)
                products.append(fused)
        layer.products = nn.ModuleList(products)
        if len(products) == 1:
            # Looking it up and calling it through nn.Module would take longer than a small product.
            self._product = products[0].forward
        self.stored = stored
        return stored

    def fuses(self, layer: LinearBase, activation: Activation) -> bool:
        """Whether the layer's kernel can apply the activation of a gated MLP to its outputs."""
        request = self._request(layer, self.parts)
        return request is not None and fuses_activation(request, activation)

    def _kernel(self, layer: LinearBase, parts: Sequence[LayerPart]) -> str | None:
        """svdserve's kernel that computes all of the parts at once; None if vLLM's products do."""
        request = self._request(layer, parts)
        return None if request is None else fused_kernel(request)

    def _request(self, layer: LinearBase, parts: Sequence[LayerPart]) -> Request | None:
        """What a kernel of svdserve would compute; None if no kernel computes such parts."""
        whole, product = parts[0].spec is None, parts[0].codec.product
        if any((part.spec is None, part.codec.product) != (whole, product) for part in parts):
            return None
        # A TP rank's channels give a partial latent, which must be summed between the products.
        if len(self.channels) != self.input_size and not whole:
            return None
        columns: list[int] = []
        for part in parts:
            if part.spec is None:
                columns += [0, len(self.channels)]
            else:
                passing = get_layout(part.spec.layout).passing(part.spec.rank)
                columns += [part.spec.in_features - passing, part.spec.rank]
        return Request(
            layer.weight.device.type,
            layer.weight.dtype,
            tuple(columns),
            prepared=True,
            weights="int8" if product == "int8" else "float",
            whole=whole,
        )

    def _rows(
        self, layer: LinearBase, checkpoint: Checkpoint, order: Tensor | None
    ) -> list[Tensor]:
        """For each linear the rows (int64) of its weight that this TP rank computes.

        ``order`` rearranges these rows in each linear.
        """
        rows = self.row_map or self.plain_rows(layer, self.full_sizes(layer, checkpoint))
        return rows if order is None else [mine[order] for mine in rows]

    def full_sizes(self, layer: LinearBase, checkpoint: Checkpoint) -> list[int]:
        """Rows of the whole weight of each linear of the layer.

        Raises:
            UserError: a dense linear is missing or of another shape than the layer's.
        """
        sizes: list[int] = []
        for part in self.parts:
            if part.spec is not None:
                sizes += part.spec.out_features
                continue
            for linear in part.names:
                for suffix in part.suffixes:
                    name, size = f"{linear}.{suffix}", self.output_sizes[len(sizes)]
                    info = checkpoint.files.info.get(name)
                    if info is None:
                        raise UserError(
                            f"{checkpoint.directory}: tensor {name} is missing, and config.json "
                            "does not say that its linear is factored"
                        )
                    full = info.shape[0] if info.shape else 0
                    fits = 0 < full <= size * layer.tp_size and full % size == 0
                    if not fits or info.shape[1:] not in ((), (self.input_size,)):
                        raise UserError(
                            f"{checkpoint.directory}: {name} is {list(info.shape)}, expected "
                            f"{[size * layer.tp_size, self.input_size]}"
                        )
                sizes.append(full)
        return sizes

    def _lowrank(
        self,
        layer: LinearBase,
        share: LowRankShare,
        bias: nn.Parameter | None,
        ordered_input: bool,
    ) -> LowRankProduct:
        """The products of this TP rank's share of the factors."""
        order = None if ordered_input else share.inputs.order
        return LowRankProduct(
            inner=product(layer, share.inner) if share.inner.shape[1] else None,
            outer=product(layer, share.outer, bias),
            order=None if order is None else order.to(layer.weight.device),
            slots=share.inputs.slots,
            reduce=self.all_reduces_latent,
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Nothing is left to do: ``load`` packs as it reads."""
        del layer
        if self.stored is None:
            raise UserError(f"{self.prefix}: factors were not loaded; use --load-format svdserve")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [.., m] of x [.., n], for the m and n of this TP rank."""
        if self.all_reduces_latent and not layer.skip_bias_add:
            bias = layer.bias  # vLLM passes it on TP rank 0 only, as it expects a sum over them
        if self._product is not None:
            return self._product(x, bias)
        y = torch.cat([product(x) for product in layer.products], dim=-1)
        return y if bias is None else y.add_(bias)
