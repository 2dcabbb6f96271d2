"""`svdserve bench --kernels`: dense against low rank, layer by layer, on any device.

The contenders take turns in every round, A B C, C B A, ..., so that other work on the machine
affects all alike; each ratio compares measurements of one round. The weights exist in so many
copies that no cache holds them all, and each call takes the next copy, because a step of a model
does not find its weights in a cache either. On a GPU the calls of a round are one CUDA graph, as in
vLLM.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, computed_field
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from svdserve.bench.options import RoundOptions
from svdserve.compression.format.codecs.int8 import quantized
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.machine import Machine, this_machine, usable_device
from svdserve.kernels.operation import prepare
from svdserve.kernels.parts import Int8Matrix, Int8Part, Part, WholePart
from svdserve.kernels.registry import (
    IMPLEMENTATIONS,
    NoImplementation,
    Request,
    asked_for,
    choose,
)

DENSE, PRODUCTS, OURS = "dense", "two products", "dense, our kernel"
_BEYOND_CACHE = 256 << 20  # bytes
_MOST_COPIES = 512
_ROUND_SECONDS = 0.02
Call = Callable[[], Tensor]
Product = Callable[[Tensor], Tensor]


class Layer(BaseModel):
    """A linear [outputs, inputs] as vLLM merges it."""

    model_config = ConfigDict(frozen=True)

    name: str
    outputs: PositiveInt
    inputs: PositiveInt


def llama_layers(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[Layer, ...]:
    """The four linears of a block of a Llama-like model."""
    return (
        Layer(name="qkv_proj", outputs=(heads + 2 * kv_heads) * head_dim, inputs=hidden),
        Layer(name="o_proj", outputs=hidden, inputs=heads * head_dim),
        Layer(name="gate_up_proj", outputs=2 * intermediate, inputs=hidden),
        Layer(name="down_proj", outputs=hidden, inputs=intermediate),
    )


def layers_of(directory: Path) -> tuple[Layer, ...]:
    """The linears of a Llama-like model, from its config.json.

    Raises:
        UserError: the file cannot be read, or lacks a size.
    """
    config = read_json(directory / "config.json")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return llama_layers(
            hidden,
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
        )
    except KeyError as error:
        raise UserError(
            f"{directory}/config.json has no {error}; give a model whose blocks are like Llama's"
        ) from None


class KernelOptions(RoundOptions):
    """What is measured. The default layers are those of a 1B Llama shape."""

    layers: tuple[Layer, ...] = llama_layers(2048, 8192, 32, 8, 64)
    keeps: tuple[float, ...] = Field(
        default=(0.8, 0.6, 0.4), description="The keep ratio κ of the low-rank layers."
    )
    rows: tuple[PositiveInt, ...] = Field(
        default=(1, 8, 32, 512), description="The number of tokens that a layer reads at once."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Single layers are measured in this dtype."
    )
    weights: Literal["float", "int8"] = Field(
        default="float",
        description="The weights, dense and factored. With `int8`, vLLM's kernel is measured too.",
    )
    device: str = Field(
        default="cpu", description="The device that computes, such as `cpu`, `cuda` or `cuda:1`."
    )


class KernelResult(BaseModel):
    """One layer at one keep ratio and number of rows; seconds of a call by round.

    Attributes:
        op: the implementation that serving would use.
        seconds: of the dense product as vLLM has it, of the dense weight by svdserve's kernel where
            that runs, of the two products alone without the gather of pivots, and of every
            implementation that runs here.
    """

    layer: Layer
    keep: float
    rank: int
    rows: int
    op: str
    seconds: dict[str, list[float]]

    def _ratio(self, slow: str, fast: str) -> float:
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def fastest_dense(self) -> str:
        """The faster way to multiply the dense weight, by the medians of the rounds."""
        ways = [name for name in (DENSE, OURS) if name in self.seconds]
        return min(ways, key=lambda name: statistics.median(self.seconds[name]))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gain(self) -> float:
        """Seconds of the fastest dense way over the op's, median of the rounds.

        Above 1 low rank is faster.
        """
        return self._ratio(self.fastest_dense, self.op)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def over_products(self) -> float:
        """The op's seconds over those of its two products alone, median of the rounds."""
        return self._ratio(self.op, PRODUCTS)


class KernelBench(BaseModel):
    """All measurements, and the machine that they were made on."""

    machine: Machine
    options: KernelOptions
    results: list[KernelResult]


def run_kernel_bench(options: KernelOptions) -> KernelBench:
    """Measure every layer at every keep ratio and number of rows.

    Raises:
        UserError: the device cannot be used, a layer stays dense, or SVDSERVE_KERNEL names an
            implementation that cannot run here.
    """
    device = usable_device(options.device)
    cases = [
        (layer, keep, _rank(layer, keep)) for layer in options.layers for keep in options.keeps
    ]
    if options.weights == "int8" and (device.type, options.dtype) != ("cpu", "bfloat16"):
        raise UserError(
            f"--weights int8 is measured on cpu in bfloat16, not on {options.device} in "
            f"{options.dtype}; leave out --device and --dtype"
        )
    dtype = getattr(torch, options.dtype)
    _served(Request(device.type, dtype, (1, 1), prepared=True, weights=options.weights))
    results: list[KernelResult] = []
    with torch.inference_mode():
        for layer, keep, rank in track(cases, "layers", console=Console(stderr=True)):
            results += _measure(layer, keep, rank, options, device)
    return KernelBench(machine=this_machine(options.device), options=options, results=results)


def print_kernel_bench(bench: KernelBench) -> None:
    """Print the measurements as a table."""
    table = Table(
        "layer", "κ", "rank", "rows", "dense, µs", "products, µs", "op, µs", "op",
        "dense / op", "op / products",
    )  # fmt: skip
    for one in bench.results:
        named = (one.fastest_dense, PRODUCTS, one.op)
        medians = (statistics.median(one.seconds[name]) * 1e6 for name in named)
        table.add_row(
            f"{one.layer.name} [{one.layer.outputs}, {one.layer.inputs}]",
            f"{one.keep:g}",
            str(one.rank),
            str(one.rows),
            *(f"{value:.1f}" for value in medians),
            one.op,
            f"{one.gain:.2f}",
            f"{one.over_products:.2f}",
        )
    Console().print(table)


def _rank(layer: Layer, keep: float) -> int:
    rank = INTERPOLATIVE.rank_for_keep(layer.outputs, layer.inputs, keep)
    if rank is None:
        raise UserError(f"{layer.name}: nothing to measure at keep {keep:g}; it stays dense")
    return rank


def _measure(
    layer: Layer, keep: float, rank: int, options: KernelOptions, device: torch.device
) -> Iterator[KernelResult]:
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        return weight.normal_(std=columns**-0.5, generator=generator)

    order = torch.randperm(layer.inputs, generator=generator, device=device)
    pivots = order[:rank].sort().values.to(torch.int32)
    int8 = options.weights == "int8"
    kept = rank * (layer.outputs + layer.inputs - rank) * (1 if int8 else dtype.itemsize)
    copies = copies_beyond_cache(kept)
    inner, outer = random(rank, layer.inputs - rank), random(layer.outputs, rank)
    weight = random(layer.outputs, layer.inputs)
    product = _int8_product if int8 else _product

    # A packed kernel copies its weights; those that keep them get copies of their own.
    part = (
        Int8Part(_rounded(inner), _rounded(outer), pivots) if int8 else Part(inner, outer, pivots)
    )
    whole = WholePart(_rounded(weight) if int8 else weight)
    prepared = {}
    for name, one_part in ((None, part), (OURS, whole)):
        request = Request.of([one_part], prepared=True)
        for one in IMPLEMENTATIONS:
            if one.reason_against(request) is None:
                prepared[name or one.name] = [
                    prepare([deepcopy(one_part)], implementation=one.name) for _ in range(copies)
                ]
    op = _served(Request.of([part], prepared=True))
    weights = [product(weight.clone()) for _ in range(copies)]
    pairs = [(product(inner.clone()), product(outer.clone())) for _ in range(copies)]
    for rows in options.rows:
        x = random(rows, layer.inputs)
        rest = x[:, rank:].contiguous()
        contenders: dict[str, list[Call]] = {
            DENSE: [partial(one, x) for one in weights],
            PRODUCTS: [partial(_both, *one, rest) for one in pairs],
        }
        for name, modules in prepared.items():
            contenders[name] = [partial(module, x) for module in modules]
        seconds = rounds(contenders, options.pairs, device)
        yield KernelResult(layer=layer, keep=keep, rank=rank, rows=rows, op=op, seconds=seconds)


def _served(request: Request) -> str:
    """The implementation that serving would use, or that could if it were measured.

    Raises:
        UserError: no implementation can compute the request, or not the one that is asked for.
    """
    try:
        return choose(request).name
    except NoImplementation as error:
        able = [one.name for one in IMPLEMENTATIONS if one.reason_against(request) is None]
        if not able or asked_for() is not None:
            raise UserError(str(error)) from None
        return able[0]


def _rounded(weight: Tensor) -> Int8Matrix:
    return Int8Matrix(*quantized(weight))


def _int8_product(weight: Tensor) -> Product:
    """The product by the kernel that vLLM chooses for int8 weights, which rounds x too."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from svdserve.server.plugin.products import Int8Product

    with set_current_vllm_config(VllmConfig()):
        return Int8Product(*quantized(weight), weight.dtype).forward


def copies_beyond_cache(stored_bytes: int) -> int:
    """How many copies of a layer are larger than a cache; at most _MOST_COPIES."""
    return min(-(-_BEYOND_CACHE // stored_bytes), _MOST_COPIES)


def _both(inner: Product, outer: Product, x: Tensor) -> Tensor:
    return outer(inner(x))


def _product(weight: Tensor) -> Product:
    """The product x Wᵀ; on CPU in half precision W is packed first, as in vLLM's layers."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return lambda x: linear(x, weight)
    operations: Any = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight)
    return lambda x: operations._linear_pointwise(x, packed, None, "none", [], "")


def rounds(
    contenders: dict[str, list[Call]], pairs: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one call of each contender in each round; a first round does not count."""
    running = {name: round_of(calls, device) for name, calls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for index in range(pairs + 1):
        names = list(running) if index % 2 == 0 else list(reversed(running))
        for name in names:
            took = running[name]()
            if index:
                seconds[name].append(took)
    return seconds


def round_of(calls: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """A function that runs all calls, repeatedly if they are short, and returns seconds per call.

    On CUDA the calls are captured in one graph.
    """
    if device.type == "cuda":
        return _cuda_round(calls)

    def run() -> float:
        count, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < _ROUND_SECONDS or count == 0:
            for call in calls:
                call()
            count += len(calls)
        return took / count

    return run


def _cuda_round(calls: Sequence[Call]) -> Callable[[], float]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles and loads what cannot be compiled or loaded during capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run() -> float:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / len(calls)

    return run
