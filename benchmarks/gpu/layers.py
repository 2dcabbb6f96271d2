"""Checks the low-rank linear on a GPU, finds its fastest configurations and times it."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import fp8
import torch
from torch import Tensor
from torch.nn.functional import linear

from svdserve.bench.kernels import Layer, copies_beyond_cache, llama_layers, rounds
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.kernels import Part, reference
from svdserve.kernels.triton.configs import PRODUCTS, Config, Plan, Tile, single
from svdserve.kernels.triton.linear import TritonFactors
from svdserve.kernels.triton.table import Entry

T = Tile
TABLE_ROWS = (16, 32, 64, 128)  # the largest numbers of rows of a table's configurations


# The linears of a block on one GPU: hidden, intermediate, heads, kv heads, head_dim.
MODELS = {
    "Llama-3-8B": llama_layers(4096, 14336, 32, 8, 128),
    # Its attention has the shapes of Llama's, so only the MLP is measured.
    "Qwen3-8B": llama_layers(4096, 12288, 32, 8, 128)[2:],
    "Llama-3-70B": llama_layers(8192, 28672, 64, 8, 128),
    "Llama-3-70B TP 8": llama_layers(8192, 28672 // 8, 64 // 8, 8 // 8, 128),
}
DRY = {"dry": llama_layers(64, 80, 4, 2, 16)[:2]}


class Weights:
    """A layer's dense weight and its factors, in more copies than a cache holds."""

    def __init__(self, layer: Layer, keep: float, device: torch.device, dry: bool) -> None:
        rank = INTERPOLATIVE.rank_for_keep(layer.outputs, layer.inputs, keep)
        assert rank is not None
        self.layer, self.keep = layer, keep
        self.rank = rank if dry else rank // 16 * 16
        self.generator = torch.Generator(device).manual_seed(0)
        self.device = device
        stored = 2 * self.rank * (layer.outputs + layer.inputs - self.rank)
        self.copies = 2 if dry else copies_beyond_cache(stored)
        order = torch.randperm(layer.inputs, generator=self.generator, device=device)
        pivots = order[: self.rank].sort().values.to(torch.int32)
        self.parts = [
            Part(
                self.random(self.rank, layer.inputs - self.rank),
                self.random(layer.outputs, self.rank),
                pivots,
            )
            for _ in range(self.copies)
        ]

    def random(self, rows: int, columns: int) -> Tensor:
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        return made.normal_(std=columns**-0.5, generator=self.generator)

    def dense(self) -> list[Tensor]:
        own = self.random(self.layer.outputs, self.layer.inputs)
        return [own, *(own.clone() for _ in range(self.copies - 1))]

    def prepared(self, in_order: bool = False) -> list[TritonFactors]:
        return [TritonFactors([part], in_order=in_order) for part in self.parts]


def medians(
    contenders: dict[str, list[Callable[[], Tensor]]], count: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a call of each contender in ``count`` rounds."""
    return {n: statistics.median(s) for n, s in rounds(contenders, count, device).items()}


def plan_of(*configs: Config) -> Plan:
    """A plan of these configurations in ascending order of rows, and the two products above."""
    return configs if configs[-1].rows is None else (*configs, PRODUCTS)


def correctness(device: torch.device, configs: Sequence[Config], dry: bool) -> dict[str, Any]:
    """The largest error of each configuration against float64, relative to the largest output."""
    shapes = [(96, 64, 20), (17, 33, 15), (48, 160, 96)]
    if not dry:
        shapes += [(6144, 4096, 1786), (4096, 14336, 3054)]
    worst: dict[str, float] = {}
    for outputs, inputs, rank in shapes:
        generator = torch.Generator(device).manual_seed(outputs)

        def random(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

        own = torch.randperm(inputs, generator=generator, device=device)[:rank].sort().values
        factor_in = random(rank, inputs - rank) / inputs**0.5
        part = Part(factor_in, random(outputs, rank) / rank**0.5, own.to(torch.int32))
        pair = Part(random(rank, inputs) / inputs**0.5, part.factor_out)
        for given in (part, pair):
            module = TritonFactors([given])
            for rows in (1, 3, 16, 31, 64, 100) if not dry else (1, 16):
                x = random(rows, inputs)
                wide = (given.factor_in.double(), given.factor_out.double(), given.pivots)
                want = reference.lowrank_linear(x.double(), *wide)
                for config in configs:
                    limit = config.rows or 1 << 30
                    if rows > limit:
                        continue
                    planned = module.with_plan(plan_of(config))
                    for _ in range(
                        2
                    ):  # the second call starts from the counters that the first left
                        got = planned(x)
                    error = float((got.double() - want).abs().max() / want.abs().max())
                    name = describe(config)
                    worst[name] = max(worst.get(name, 0.0), math.inf if error != error else error)
    allowed = 2**-7
    wrong = {name: error for name, error in worst.items() if error > allowed}
    return {"allowed": allowed, "worst": worst, "wrong": wrong}


def describe(config: Config) -> str:
    """A short text for a configuration."""
    if config.shrink is None or config.expand is None:
        return "products"
    parts = [
        f"{t.rows}x{t.columns}x{t.depth}w{t.warps}s{t.stages}/{t.splits}l{t.lines}"
        for t in (config.shrink, config.expand)
    ]
    return f"{config.launch} " + " ".join(parts)


# For each number of rows: tiles of shrink with the splits to try, and tiles of expand.
CANDIDATES: dict[int, tuple[list[tuple[Tile, tuple[int, ...]]], list[Tile]]] = {
    16: (
        [
            (T(16, 16, 128, 2, 5), (1, 2, 4)),
            (T(16, 16, 256, 4, 3), (2, 4)),
            (T(16, 32, 128, 4, 4), (2, 4, 8)),
            (T(16, 32, 64, 2, 6), (4, 8)),
            (T(16, 64, 64, 4, 5), (8,)),
        ],
        [
            T(16, 16, 128, 2, 5),
            T(16, 16, 256, 4, 3),
            T(16, 32, 128, 4, 4),
            T(16, 32, 64, 2, 6),
            T(16, 64, 64, 4, 5),
        ],
    ),
    32: (
        [
            (T(32, 16, 128, 2, 4), (2, 4)),
            (T(32, 32, 128, 4, 4), (2, 4)),
            (T(32, 64, 64, 4, 5), (4, 8)),
        ],
        [T(32, 16, 128, 2, 4), T(32, 32, 128, 4, 4), T(32, 64, 64, 4, 5), T(32, 32, 64, 2, 6)],
    ),
    64: (
        [
            (T(64, 32, 64, 4, 5), (2, 4)),
            (T(64, 64, 64, 4, 4), (2, 4, 8)),
            (T(64, 128, 64, 8, 3), (4, 8)),
        ],
        [T(64, 32, 64, 4, 5), T(64, 64, 64, 4, 4), T(64, 128, 64, 8, 3), T(64, 32, 128, 4, 3)],
    ),
    128: (
        [
            (T(128, 64, 64, 4, 4), (2, 4)),
            (T(128, 128, 64, 8, 3), (2, 4)),
            (T(64, 64, 64, 4, 4), (2, 4)),
        ],
        [T(128, 64, 64, 4, 4), T(128, 128, 64, 8, 3), T(64, 64, 64, 4, 4)],
    ),
}
LINES = (0, 1, 4)


def stages(rows: int, dry: bool) -> Iterator[Callable[[Config], list[Config]]]:
    """The steps of the search; each gives configurations to try, given the best so far."""
    shrinks, expands = CANDIDATES[rows]
    if dry:
        shrinks, expands = [(shrinks[0][0], shrinks[0][1][:2])], expands[:2]
    early = ("two",) if dry else ("two", "early")

    def one_tile(_: Config) -> list[Config]:
        tiles = [replace(t, splits=s) for t, splits in shrinks for s in splits]
        both = [Config(rows, t, expands[0]) for t in tiles]
        return both + [single(rows, t) for t in tiles if t.rows >= rows]

    def the_other(best: Config) -> list[Config]:
        if best.launch == "one":
            return [best]
        return [replace(best, expand=tile) for tile in expands]

    def the_launch(best: Config) -> list[Config]:
        found = [best]
        for lines in LINES:
            assert best.shrink is not None
            assert best.expand is not None
            own = replace(best.shrink, lines=lines), replace(best.expand, lines=lines)
            kinds = ("one",) if best.launch == "one" else early
            found += [
                replace(best, shrink=own[0], expand=own[1], launch=kind)
                for kind in kinds
                if kind != "two" or lines == 0
            ]
        return found

    yield from (one_tile, the_other, the_launch)


def tune(device: torch.device, dry: bool) -> tuple[Entry, dict[str, Any]]:
    """Find what is fastest for each number of rows over the layers of an 8B model.

    The layers have high and low keep ratios in turn, so that their columns cover the range of both.

    Args:
        device: of the weights.
        dry: whether to try few candidates on tiny layers.

    Returns:
        The entry of a dispatch table, which has the two products for the rows at which no kernel
        was faster, and the measurements.
    """
    layers = DRY["dry"] if dry else MODELS["Llama-3-8B"]
    keeps = [(0.8, 0.4)[index % 2] for index in range(len(layers))]
    weights = [Weights(layer, keep, device, dry) for layer, keep in zip(layers, keeps, strict=True)]
    columns = [size for own in weights for size in (own.rank, own.layer.inputs - own.rank)]
    modules = [own.prepared() for own in weights]
    tried: dict[str, dict[str, float]] = {}
    chosen: list[Config] = []
    count = 1 if dry else 4
    with _compilers(dry) as warm:
        for rows in TABLE_ROWS[:1] if dry else TABLE_ROWS:
            inputs = [own.random(rows, own.layer.inputs) for own in weights]
            best = Config(rows, T(16, 16, 128, 2, 5), T(16, 16, 128, 2, 5))
            record: dict[str, float] = {}
            tried[str(rows)] = record
            for stage in stages(rows, dry):
                options = stage(best)
                warm(options)
                for config in options:
                    if describe(config) not in record:
                        cost = _cost(config, modules, inputs, count)
                        record[describe(config)] = cost
                best = min(options, key=lambda c: record[describe(c)])
            products = record["products"] = _cost(PRODUCTS, modules, inputs, count)
            chosen.append(best if record[describe(best)] < products else Config(rows))
    entry = Entry(dtype="bfloat16", columns=(min(columns), max(columns)), plan=plan_of(*chosen))
    return entry, {
        "keep": {layer.name: keep for layer, keep in zip(layers, keeps, strict=True)},
        "microseconds_of_the_block": tried,
        "chosen": entry.model_dump(mode="json"),
    }


def _cost(
    config: Config, modules: list[list[TritonFactors]], inputs: list[Tensor], count: int
) -> float:
    """Median microseconds of one block's layers in ``count`` rounds; infinite if it cannot run."""
    total = 0.0
    try:
        for copies_, x in zip(modules, inputs, strict=True):
            calls = [partial(module.with_plan(plan_of(config)), x) for module in copies_]
            total += medians({"own": calls}, count, x.device)["own"]
    except Exception as error:  # a candidate may not fit the GPU
        print(f"  {describe(config)}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return math.inf
    return total * 1e6


class _compilers:
    """Processes that compile configurations into Triton's cache in parallel."""

    def __init__(self, dry: bool) -> None:
        self.pool = None if dry else ProcessPoolExecutor(10, get_context("spawn"))

    def __enter__(self) -> Callable[[Sequence[Config]], None]:
        return self.warm

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def warm(self, configs: Sequence[Config]) -> None:
        if self.pool:
            list(self.pool.map(compile_now, configs))


def compile_now(config: Config) -> None:
    """Run a configuration once on a tiny layer; errors are reported when it is measured."""
    device = torch.device("cuda")
    part = Part(
        torch.zeros(16, 16, dtype=torch.bfloat16, device=device),
        torch.zeros(16, 16, dtype=torch.bfloat16, device=device),
        torch.arange(16, dtype=torch.int32, device=device),
    )
    try:
        for in_order in (False, True):
            module = TritonFactors([part], plan_of(config), in_order)
            module(part.factor_in.new_zeros(1, 32))
        torch.cuda.synchronize()
    except Exception as error:
        print(f"  {describe(config)}: {type(error).__name__}", flush=True)


def times(
    device: torch.device,
    plan: Plan,
    dry: bool,
    left: Callable[[], float],
) -> list[dict[str, Any]]:
    """Microseconds of every layer: dense, two products, and our kernels by a plan.

    Args:
        device: of the weights.
        plan: what is fastest for each number of rows.
        dry: whether to measure tiny layers.
        left: gives the seconds that may still be spent; layers beyond them are left out.
    """
    rows_tried = (1, 8) if dry else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
    first = plan_of(single(16, T(16, 16, 128, 2, 5)), single(64, T(64, 32, 64, 4, 6)))
    found = []
    models = DRY if dry else MODELS
    for model, layer in [(name, layer) for name, own in models.items() for layer in own]:
        dense: list[Tensor] = []
        for keep in (0.8,) if dry else (0.8, 0.6, 0.4):
            if left() < 0:
                return found
            own = Weights(layer, keep, device, dry)
            dense = dense or own.dense()
            modules, ordered = own.prepared(), own.prepared(in_order=True)
            for rows in rows_tried:
                x = own.random(rows, layer.inputs)
                arranged = own.random(rows, ordered[0].in_features)

                def ours_with(
                    plan: Plan, modules: Sequence[TritonFactors], given: Tensor
                ) -> list[Callable[[], Tensor]]:
                    return [partial(module.with_plan(plan), given) for module in modules]

                contenders: dict[str, list[Callable[[], Tensor]]] = {
                    "dense": [partial(linear, x, weight) for weight in dense],
                    "gathered products": ours_with((PRODUCTS,), modules, x),
                    "products in order": ours_with((PRODUCTS,), ordered, arranged),
                }
                if rows <= TABLE_ROWS[-1]:
                    contenders["kernels"] = ours_with(plan, modules, x)
                    contenders["kernels in order"] = ours_with(plan, ordered, arranged)
                if rows <= 64 and model != "Qwen3-8B":
                    contenders["first edition"] = ours_with(first, modules, x)
                if model == "Llama-3-8B" and ordered[0].in_features == layer.inputs:
                    factors = [(part.factor_in, part.factor_out) for part in own.parts]
                    contenders |= fp8.contenders(dense, factors, x, arranged)
                seconds = medians(contenders, 5, device)
                found.append(
                    {
                        "model": model,
                        **layer.model_dump(),
                        "keep": keep,
                        "rank": own.rank,
                        "rows": rows,
                        "microseconds": {n: round(s * 1e6, 3) for n, s in seconds.items()},
                    }
                )
            del own, modules, ordered
    return found
