"""Low-rank and int8 linear layers of vLLM: creation, loading, tensor parallelism, forward pass.

A layer [m, n] of one or more ``Part``s (see quantization.py). Each factored part is two products
around the rank-r vector z, y = C (x[pivots] + Z x[rest]) or y = U (V x); a layer factored as a
whole, such as a shared qkv_proj, therefore costs exactly two products, or one fused operation
where svdserve.kernels has one for the device and dtype; on a GPU that is one for several parts too.

Tensor parallelism. Column-parallel: the rank's rows of factor_out, all of factor_in, as every rank
needs all of z. Row-parallel: the rank's input channels, that is columns of factor_in and the pivots
among them, give a partial z; z [.., r] is all-reduced instead of y [.., m], fewer bytes, and every
rank then holds the whole y.

Int8. Factors and dense weights in int8 go through vLLM's own int8 kernels, one for each product;
these round the product's input to int8 as well. A row-parallel shard is rounded by its own greatest
inputs; the scales of its rows are those of the whole rows.

Gathering the pivots of x costs most at down_proj, which has the most inputs; gated_mlp.py says how
it is spared, and when gate_up_proj takes over the activation.

Interface: LinearMethodBase in vllm/model_executor/layers/linear.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

from svdserve.compression.checkpoint import Checkpoint
from svdserve.compression.errors import UserError
from svdserve.compression.factors import Factors, other_channels
from svdserve.kernels import Activation, prepare
from svdserve.kernels import Part as KernelPart
from svdserve.server.products import (
    LowRankProduct,
    fused_kernel,
    fuses_activation,
    int8_kernel,
    kernel_part,
    product,
)
from svdserve.server.quantization import Part

logger = init_logger(__name__)


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of weights on this rank: of factors, of dense weights, and all of it were it dense."""

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
        stored: bytes on this rank, None until loaded.
    """

    def __init__(self, prefix: str, parts: tuple[Part, ...]) -> None:
        self.prefix = prefix
        self.parts = parts
        self.stored: StoredBytes | None = None
        self.row_map: list[Tensor] | None = None
        """For each linear the rows that this TP rank holds, where the model rearranges them."""
        self._product: Callable[..., Tensor] | None = None  # of the whole layer, if one computes it

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
            UserError: the checkpoint's sizes do not fit the layer or the number of ranks.
        """
        del output_size, extra_weight_attrs
        if any(part.weights == "int8" for part in self.parts):
            int8_kernel(params_dtype)
        self.input_size = input_size
        start = layer.tp_rank * input_size_per_partition
        sharded = input_size_per_partition != input_size
        self.channels = (
            range(start, start + input_size_per_partition) if sharded else range(input_size)
        )
        self.output_sizes = list(output_partition_sizes)
        self._check_geometry(input_size, layer.tp_size)
        # A layer whose caller sums the outputs (reduce_results off) stays a partial sum of y.
        # So does one that may get LoRA adapters: vLLM adds a rank's share of theirs before the sum.
        adapters = get_current_vllm_config().lora_config is not None
        reduces = sharded and layer.tp_size > 1 and layer.reduce_results and not adapters
        self.reduces_rank = reduces and self.parts[0].spec is not None
        if self.reduces_rank:
            layer.reduce_results = False
        # LoRA and MLA code of vLLM read layer.weight (its device); it stays empty.
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)

    def _check_geometry(self, input_size: int, tp_size: int) -> None:
        outputs = sum(part.outputs for part in self.parts)
        if outputs != len(self.output_sizes):
            raise UserError(
                f"{self.prefix}: vLLM merges {len(self.output_sizes)} linears here, the checkpoint "
                f"lists {outputs}; keep this layer dense"
            )
        local = iter(self.output_sizes)
        for part in self.parts:
            sizes = list(islice(local, part.outputs))
            if part.spec is None:
                continue
            if part.spec.in_features != input_size:
                raise UserError(
                    f"{part.names[0]}: {part.spec.in_features} inputs, the model has {input_size}"
                )
            for full, size in zip(part.spec.out_features, sizes, strict=True):
                if full % size or tp_size % (full // size):
                    raise UserError(
                        f"{part.names[0]}: {full} outputs do not fit a layer of {size} on each of "
                        f"{tp_size} rank(s); the checkpoint belongs to another configuration"
                    )

    def full_sizes(self, tp_size: int) -> list[int]:
        """Rows of the whole weight of each linear of the layer."""
        sizes: list[int] = []
        local = iter(self.output_sizes)
        for part in self.parts:
            mine = list(islice(local, part.outputs))
            spec = part.spec
            sizes += spec.out_features if spec is not None else [m * tp_size for m in mine]
        return sizes

    def plain_rows(self, layer: LinearBase, full: Sequence[int]) -> list[Tensor]:
        """For each linear the rows that a TP rank holds where the model rearranges nothing."""
        sizes = zip(full, self.output_sizes, strict=True)
        return [_rows(torch.arange(rows), [rows], [size], layer, None) for rows, size in sizes]

    def checkpoint_names(self) -> set[str]:
        """The tensors of the checkpoint that ``load`` reads."""
        return {
            f"{name}.{suffix}"
            for part in self.parts
            for name in part.names
            for suffix in part.suffixes
        }

    def input_order(self, checkpoint: Checkpoint) -> Tensor | None:
        """The order of this rank's input channels that needs no gather; None where none does."""
        spec = self.parts[0].spec
        if len(self.parts) > 1 or spec is None or spec.layout != "interpolative":
            return None
        name = f"{self.parts[0].names[0]}.pivots"
        pivots = checkpoint.files.load([name])[name]
        return _Places.of(pivots, spec.in_features, self.channels).order

    def load(
        self,
        layer: LinearBase,
        checkpoint: Checkpoint,
        *,
        row_order: Tensor | None = None,
        ordered_input: bool = False,
        activation: Activation | None = None,
    ) -> StoredBytes:
        """Read this rank's share of the layer and bring it into the form that ``apply`` uses.

        What one kernel computes, mostly one part, is packed before more is read, so that no other
        plain weights exist beside the packed ones.

        Args:
            layer: whose method this is.
            checkpoint: the files.
            row_order: of the outputs of every member; the layer must have no bias.
            ordered_input: whether the inputs come in ``input_order``.
            activation: to apply to the outputs, for a layer that ``fuses`` it.

        Returns:
            What the rank now stores, also kept as ``stored``.

        Raises:
            UserError: a dense member is missing or of another shape than the layer's.
        """
        bias = layer.bias if len(self.parts) == 1 else None
        local = iter(self.output_sizes)
        maps = iter(self.row_map or [])
        stored = StoredBytes()
        products: list[nn.Module] = []
        together = self._kernel(layer, self.parts) is not None
        for batch in [self.parts] if together else [(part,) for part in self.parts]:
            kernel = self._kernel(layer, batch)
            ready: list[KernelPart] = []
            for part in batch:
                sizes = list(islice(local, part.outputs))
                mapped = list(islice(maps, part.outputs)) or None
                whole = sum(sizes) * len(self.channels) * layer.weight.element_size()
                stored += StoredBytes(dense_equivalent=whole)
                if part.spec is None:
                    weight, scale = self._dense(layer, part, sizes, checkpoint, row_order, mapped)
                    dense = product(layer, weight, scale, bias)
                    stored += StoredBytes(dense=dense.stored_bytes)
                    products.append(dense)
                    continue
                factors = self._factors(layer, part, sizes, checkpoint, row_order, mapped)
                if kernel is not None:
                    ready.append(kernel_part(layer, factors, ordered_input))
                    continue
                lowrank = self._lowrank(layer, factors, bias, ordered_input)
                stored += StoredBytes(lowrank=lowrank.stored_bytes)
                products.append(lowrank)
            if kernel is not None:
                fused = prepare(ready, activation=activation, implementation=kernel)
                stored += StoredBytes(lowrank=fused.stored_bytes)
                products.append(fused)
        layer.products = nn.ModuleList(products)
        if len(products) == 1:
            # Finding and calling it as modules would take longer than a small product.
            self._product = products[0].forward
        self.stored = stored
        return stored

    def fuses(self, layer: LinearBase, activation: Activation) -> bool:
        """Whether the layer's kernel can apply the activation of a gated MLP to its outputs."""
        columns = self._columns(self.parts)
        return bool(columns) and fuses_activation(columns, layer.weight, activation)

    def _kernel(self, layer: LinearBase, parts: Sequence[Part]) -> str | None:
        """svdserve's kernel that computes all of the parts at once; None if vLLM's products do."""
        columns = self._columns(parts)
        return fused_kernel(columns, layer.weight) if columns else None

    def _columns(self, parts: Sequence[Part]) -> list[int]:
        """Of every factor, where a kernel of svdserve may compute the parts; else none."""
        if len(self.channels) != self.input_size:
            return []
        columns: list[int] = []
        for part in parts:
            if part.spec is None or part.weights == "int8":
                return []
            columns += [part.spec.tensors()["factor_in"][1], part.spec.rank]
        return columns

    def _factors(
        self,
        layer: LinearBase,
        part: Part,
        sizes: Sequence[int],
        checkpoint: Checkpoint,
        row_order: Tensor | None,
        mapped: list[Tensor] | None,
    ) -> Factors:
        """A factored part, its pivots ascending; ``factor_out`` holds this rank's rows."""
        assert part.spec is not None
        factors = _ascending(checkpoint.factors(part.names[0]))
        rows = part.spec.out_features, sizes, layer, row_order, mapped
        scale = factors.factor_out_scale
        return replace(
            factors,
            factor_out=_rows(factors.factor_out, *rows),
            factor_out_scale=None if scale is None else _rows(scale, *rows),
        )

    def _dense(
        self,
        layer: LinearBase,
        part: Part,
        sizes: Sequence[int],
        checkpoint: Checkpoint,
        row_order: Tensor | None,
        mapped: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's share of a dense part's weight, and the scales of its rows where int8."""
        found: dict[str, list[Tensor]] = {suffix: [] for suffix in part.suffixes}
        for index, (linear, size) in enumerate(zip(part.names, sizes, strict=True)):
            mine = None if mapped is None else [mapped[index]]
            for suffix, blocks in found.items():
                name = f"{linear}.{suffix}"
                if name not in checkpoint.files:
                    raise UserError(
                        f"{checkpoint.directory}: tensor {name} is missing; it is not factored "
                        "either"
                    )
                tensor = checkpoint.files.load([name])[name]
                copies = layer.tp_size * size // tensor.shape[0]
                if copies < 1 or tensor.shape[1:] not in ((), (self.input_size,)):
                    raise UserError(
                        f"{checkpoint.directory}: {name} is {list(tensor.shape)}, expected "
                        f"{[size * layer.tp_size, self.input_size]}"
                    )
                rows = [tensor.shape[0]]
                blocks.append(_rows(tensor, rows, [size], layer, row_order, mine))
        weight, *scale = (torch.cat(blocks) for blocks in found.values())
        return weight[:, self.channels.start : self.channels.stop], scale[0] if scale else None

    def _lowrank(
        self,
        layer: LinearBase,
        factors: Factors,
        bias: nn.Parameter | None,
        ordered_input: bool,
    ) -> LowRankProduct:
        """The products of factors whose ``factor_out`` holds this rank's rows."""
        if factors.pivots is None:
            columns, slots, order = self.channels, range(0), None
        else:
            places = _Places.of(factors.pivots, factors.in_features, self.channels)
            columns, slots = places.columns, places.slots
            order = None if ordered_input else places.order.to(layer.weight.device)
        inner = factors.factor_in[:, columns.start : columns.stop]
        return LowRankProduct(
            inner=product(layer, inner, factors.factor_in_scale) if inner.shape[1] else None,
            outer=product(layer, factors.factor_out, factors.factor_out_scale, bias),
            order=order,
            slots=slots,
            reduce=self.reduces_rank,
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Nothing is left to do: ``load`` packs as it reads."""
        del layer
        if self.stored is None:
            raise UserError(f"{self.prefix}: factors were not loaded; use --load-format svdserve")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [.., m] of x [.., n] for this rank's m and n."""
        if self.reduces_rank and not layer.skip_bias_add:
            bias = layer.bias  # vLLM passes it on rank 0 only, expecting a sum over the ranks
        if self._product is not None:
            return self._product(x, bias)
        y = torch.cat([product(x) for product in layer.products], dim=-1)
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True)
class _Places:
    """Where a rank's input channels stand in the interpolative layout.

    Attributes:
        slots: of its pivots among all pivots, that is in z.
        columns: of its other channels among all others, that is in Z.
        order: its channels, counted from its first one: pivots, then the others; int64.
    """

    slots: range
    columns: range
    order: Tensor

    @classmethod
    def of(cls, pivots: Tensor, in_features: int, channels: range) -> "_Places":
        pivots = pivots.long().sort().values
        rest = other_channels(pivots, in_features)
        slots, columns = _within(pivots, channels), _within(rest, channels)
        mine = pivots[slots.start : slots.stop], rest[columns.start : columns.stop]
        return cls(slots, columns, torch.cat(mine) - channels.start)


def _rows(
    weight: Tensor,
    full: Sequence[int],
    local: Sequence[int],
    layer: LinearBase,
    order: Tensor | None,
    mapped: Sequence[Tensor] | None = None,
) -> Tensor:
    """The rank's rows of a stacked weight: of each member, ``local`` of its ``full`` rows.

    A member held by fewer shards than there are ranks (key and value heads, replicated layers) is
    repeated on consecutive ranks, as QKVParallelLinear.weight_loader does. ``mapped`` names
    other rows of each member, where the model rearranges them (twin.py). ``order`` rearranges the
    rank's rows of each member.
    """
    blocks = []
    members = zip(torch.split(weight, list(full)), full, local, strict=True)
    for index, (block, rows, size) in enumerate(members):
        copies = layer.tp_size * size // rows
        start = layer.tp_rank // copies * size
        mine = block[start : start + size] if mapped is None else block[mapped[index]]
        blocks.append(mine if order is None else mine[order])
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _within(ascending: Tensor, channels: range) -> range:
    """The positions in an ascending list of channels that fall into ``channels``."""
    bounds = torch.tensor([channels.start, channels.stop])
    start, stop = torch.searchsorted(ascending, bounds).tolist()
    return range(start, stop)


def _ascending(factors: Factors) -> Factors:
    """The same weight with its pivots sorted, so that each rank's are contiguous in z."""
    if factors.pivots is None or bool((factors.pivots.diff() > 0).all()):
        return factors
    pivots, order = factors.pivots.sort()
    scale = factors.factor_in_scale
    return replace(
        factors,
        factor_in=factors.factor_in[order],
        factor_out=factors.factor_out[:, order],
        pivots=pivots,
        factor_in_scale=None if scale is None else scale[order],
    )
