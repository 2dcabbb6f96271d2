"""The low-rank linear on GPUs: prepares factors for the Triton kernels and calls them.

The layer's plan and the number of rows of x decide which configuration runs, such as one launch
(``kernels.shrink_expand``) for few rows and two for more. Nothing is tuned at run time or waits for
the device, so a CUDA graph captures exactly what will run.

Importing this module imports Triton.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from svdserve.kernels.parts import Part, PreparedFactors, check_bias, check_input
from svdserve.kernels.torch_library import define
from svdserve.kernels.triton import kernels
from svdserve.kernels.triton.configs import (
    GUESSES,
    MOST_BLOCKS,
    Plan,
    config_for,
    from_text,
    to_text,
)
from svdserve.kernels.triton.launch import (
    GATHERED,
    IN_ORDER,
    PLAIN,
    expand_by_products,
    latent_by_products,
    launch,
)
from svdserve.kernels.triton.layout import (
    ALIGNMENT,
    aligned,
    aligned_bias,
    channels_of,
    flat,
    indices,
    make_part_table,
    padded,
)

_LARGEST = 2**31  # offsets within one factor have 32 bits


class TritonFactors(PreparedFactors):
    """PreparedFactors for the Triton kernels: padded, and those of all parts in one vector."""

    inner: Tensor
    outer: Tensor
    channels: Tensor
    pivots: Tensor
    part_table: Tensor
    counters: Tensor

    def __init__(
        self, parts: Sequence[Part], plan: Plan | None = None, in_order: bool = False
    ) -> None:
        """Copy the factors, unless there is one part that has the layout of the kernels already.

        Args:
            parts: each with its own rank; shapes are those of ``lowrank_linear``, which the caller
                has checked.
            plan: what runs for each number of rows; None for the guess for the dtype.
            in_order: whether x arrives with its columns in ``order``; for one part only.

        Raises:
            ValueError: a factor has 2³¹ elements or more, or the plan is not valid.
        """
        super().__init__()
        device, dtype = parts[0].factor_in.device, parts[0].factor_in.dtype
        self.plan = to_text(plan or GUESSES[dtype])
        self.ranks = [padded(part.rank) for part in parts]
        self.outputs = [part.outputs for part in parts]
        # Several parts share the gathering kernel; a pair is then a part without pivots.
        gathers = len(parts) > 1 or parts[0].pivots is not None
        self.read = IN_ORDER if in_order else GATHERED if gathers else PLAIN
        inner = [aligned(part.factor_in, rows=True) for part in parts]
        outer = [aligned(part.factor_out, rows=True) for part in parts]
        if max(factor.numel() for factor in (*inner, *outer)) >= _LARGEST:
            raise ValueError(
                f"a factor has {_LARGEST:,} elements or more; the kernels can take fewer only"
            )
        self.widths = widths = [factor.shape[1] for factor in inner]
        self.in_features = self.ranks[0] + widths[0] if in_order else parts[0].in_features
        channels = [channels_of(part) for part in parts]
        buffers = {
            "inner": flat(inner),
            "outer": flat(outer),
            "channels": indices([rest for _, rest in channels], widths),
            "pivots": indices([own for own, _ in channels], self.ranks),
            "part_table": make_part_table(
                tuple(self.ranks), tuple(widths), tuple(self.outputs), device
            ),
            "counters": torch.zeros(
                kernels.COUNTERS + MOST_BLOCKS * sum(self.ranks) // ALIGNMENT,
                dtype=torch.int32,
                device=device,
            ),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.stored_bytes = sum(p.factor_in.nbytes + p.factor_out.nbytes for p in parts)

    def with_plan(self, plan: Plan) -> "TritonFactors":
        """The same factors, in the same memory, multiplied by another plan.

        Raises:
            ValueError: the plan is not valid.
        """
        other = copy(self)
        other.plan = to_text(plan)
        return other

    @property
    def order(self) -> Tensor:
        """The channels (int64) in the order of shrink, pivots first; -1 is a column of zeros."""
        return torch.cat([self.pivots, self.channels]).long()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., sum of m] of x [..., n]; bias [sum of m] or None."""
        return torch.ops.svdserve.lowrank_triton(  # type: ignore[no-any-return]
            x,
            self.inner,
            self.outer,
            self.channels,
            self.pivots,
            self.part_table,
            self.counters,
            self.in_features,
            self.ranks,
            self.widths,
            self.outputs,
            self.read,
            self.plan,
            bias,
        )


def _run(
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    channels: Tensor,
    pivots: Tensor,
    part_table: Tensor,
    counters: Tensor,
    in_features: int,
    ranks: Sequence[int],
    widths: Sequence[int],
    outputs: Sequence[int],
    read: int,
    plan: str,
    bias: Tensor | None,
) -> Tensor:
    check_input(x, in_features, inner)
    check_bias(bias, sum(outputs), x)
    rows = x.numel() // in_features
    whole_outputs = [padded(size) for size in outputs]
    config = config_for(from_text(plan), rows)
    y = x.new_empty(rows, sum(whole_outputs))
    if rows:
        whole = aligned(x.reshape(rows, in_features))
        added = None if bias is None else aligned_bias(bias, outputs)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if config.shrink is None:
                latent = latent_by_products(whole, inner, channels, pivots, ranks, widths, read)
                expand_by_products(latent, outer, added, ranks, whole_outputs, y)
            else:
                tensors = {
                    "x_ptr": whole,
                    "inner_ptr": inner,
                    "channels_ptr": channels,
                    "pivots_ptr": pivots,
                    "outer_ptr": outer,
                    "bias_ptr": y if added is None else added,
                    "y_ptr": y,
                    "parts_ptr": part_table,
                    "counters_ptr": counters,
                    "arrivals_ptr": counters[kernels.COUNTERS :],
                }
                sizes = {
                    "rows": rows,
                    "x_blocks": whole.stride(0) // ALIGNMENT,
                    "y_blocks": y.shape[1] // ALIGNMENT,
                    "parts": len(ranks),
                    "has_bias": int(bias is not None),
                    "rest_block": ranks[0] // ALIGNMENT if read == IN_ORDER else 0,
                    "READ": read,
                }
                launch(tensors, sizes, ranks, whole_outputs, config.shrink, config)
    if whole_outputs != list(outputs):
        blocks = torch.split(y, whole_outputs, dim=1)
        y = torch.cat([b[:, :size] for b, size in zip(blocks, outputs, strict=True)], dim=1)
    return y.reshape(*x.shape[:-1], sum(outputs))


def _fake(
    x: Tensor,
    inner: Tensor,
    outer: Tensor,
    channels: Tensor,
    pivots: Tensor,
    part_table: Tensor,
    counters: Tensor,
    in_features: int,
    ranks: Sequence[int],
    widths: Sequence[int],
    outputs: Sequence[int],
    read: int,
    plan: str,
    bias: Tensor | None,
) -> Tensor:
    del inner, outer, channels, pivots, part_table, counters, in_features, ranks, widths, read, plan
    del bias
    return x.new_empty(*x.shape[:-1], sum(outputs))


define(
    "lowrank_triton(Tensor x, Tensor inner, Tensor outer, Tensor channels, Tensor pivots, "
    "Tensor part_table, Tensor counters, int in_features, int[] ranks, int[] widths, "
    "int[] outputs, int read, str plan, Tensor? bias) -> Tensor",
    _run,
    _fake,
)
