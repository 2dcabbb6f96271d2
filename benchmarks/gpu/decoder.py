"""Measures a whole decoder of the shape of Llama-3-8B with random weights: dense and low rank.

Both sides get the same merged layers (qkv, gate and up), the same compiled norms, rotary embedding
and activation, the same attention and one CUDA graph for a step.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from svdserve.bench.kernels import round_of
from svdserve.compression.format.layouts import INTERPOLATIVE
from svdserve.kernels import Part
from svdserve.kernels.triton.configs import Plan
from svdserve.kernels.triton.linear import TritonFactors

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; the KV cache has ``context`` tokens when a token is decoded."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    vocabulary: int = 128256
    context: int = 512


DRY = Shape(64, 160, 4, 2, 16, 2, 256, 16)


def _norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = residual + x
    wide = residual.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return scaled.to(x.dtype) * weight, residual


def _norm_in_order(
    x: Tensor, residual: Tensor, weight: Tensor, order: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    normed, residual = _norm(x, residual, weight)
    return normed[:, order] * own, residual


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate.float()).to(x.dtype) * up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Decoder:
    """Blocks of merged linears, which are dense if ``keep`` is None."""

    def __init__(
        self,
        shape: Shape,
        keep: float | None,
        in_order: bool,
        plan: Plan,
        device: torch.device,
        compiled: Callable[[Any], Any],
    ) -> None:
        self.shape, self.plan, self.device = shape, plan, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.bytes = 0
        self.norm = compiled(_norm)
        self.norm_in_order = compiled(_norm_in_order)
        self.gated, self.rotated = compiled(_gated), compiled(_rotated)
        s = shape
        attention, cached = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.blocks = []
        for _ in range(s.layers):
            down, arranged = self._linear(s.hidden, s.intermediate, keep, in_order)
            # Gate and up have their rows in the order that down reads, which costs no time.
            width = len(arranged[0]) if arranged else s.intermediate
            self.blocks.append(
                {
                    "qkv": self._linear(attention + 2 * cached, s.hidden, keep, in_order),
                    "o": self._linear(s.hidden, attention, keep, False),
                    "gate_up": self._linear(
                        2 * width, s.hidden, keep, in_order, counted=2 * s.intermediate
                    ),
                    "down": (down, None),
                }
            )
        self.weight = self._random(1, s.hidden)[0] + 1
        self.head = self._random(s.vocabulary, s.hidden)
        self.bytes += self.head.nbytes

    def _random(self, rows: int, columns: int) -> Tensor:
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        return made.normal_(std=columns**-0.5, generator=self.generator)

    def _linear(
        self,
        outputs: int,
        inputs: int,
        keep: float | None,
        in_order: bool,
        counted: int | None = None,
    ) -> tuple[Apply, tuple[Tensor, Tensor] | None]:
        """The product, and, if in order, the order of its inputs and a factor, 0 for padding."""
        rank = keep and INTERPOLATIVE.rank_for_keep(counted or outputs, inputs, keep)
        if not rank:
            weight = self._random(outputs, inputs)
            self.bytes += weight.nbytes
            return partial(_product, weight), None
        order = torch.randperm(inputs, generator=self.generator, device=self.device)
        pivots = order[:rank].sort().values.to(torch.int32)
        part = Part(self._random(rank, inputs - rank), self._random(outputs, rank), pivots)
        module = TritonFactors([part], self.plan, in_order)
        self.bytes += part.factor_in.nbytes + part.factor_out.nbytes
        if not in_order:
            return module, None
        channels = module.order
        return module, (channels.clamp(min=0), (channels >= 0).to(torch.bfloat16))

    def step(
        self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Logits [sequences, vocabulary] of the last of tokens [sequences, new, hidden]."""
        s = self.shape
        sequences, new, _ = tokens.shape
        x = tokens.reshape(-1, s.hidden)
        residual = torch.zeros_like(x)
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            normed, residual = self._normed(x, residual, block["qkv"])
            qkv = block["qkv"][0](normed).view(sequences, new, -1, s.head_dim)
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 2)
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            keys[:, -new:], values[:, -new:] = k, v
            attended = scaled_dot_product_attention(
                q.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                is_causal=new > 1,
                enable_gqa=True,
            )
            x = block["o"][0](attended.transpose(1, 2).reshape(sequences * new, -1))
            normed, residual = self._normed(x, residual, block["gate_up"])
            x = block["down"][0](self.gated(block["gate_up"][0](normed)))
        normed, _ = self.norm(x, residual, self.weight)
        return linear(normed.view(sequences, new, -1)[:, -1], self.head)

    def _normed(self, x: Tensor, residual: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        if layer[1] is None:
            return self.norm(x, residual, self.weight)  # type: ignore[no-any-return]
        return self.norm_in_order(x, residual, self.weight, *layer[1])  # type: ignore[no-any-return]


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def measure(
    device: torch.device, plan: Plan, dry: bool, left: Callable[[], float]
) -> list[dict[str, Any]]:
    """Milliseconds of a decoding step at 1, 8 and 64 sequences and of a prefill of 2,048 tokens.

    Args:
        device: of the weights.
        plan: of the low-rank layers, by the table of the GPU.
        dry: whether to measure a tiny decoder.
        left: gives the seconds that may still be spent; variants beyond them are left out.
    """
    shape = DRY if dry else Shape()
    compiled: Callable[[Any], Any] = (lambda f: f) if dry else torch.compile
    found: list[dict[str, Any]] = []
    variants = [(None, False), (0.8, False), (0.8, True), (0.6, True), (0.4, True)]
    work = [("decode", 1, 1), ("decode", 8, 1), ("decode", 64, 1), ("prefill", 1, 2048)]
    if dry:
        variants, work = variants[:3], [("decode", 2, 1), ("prefill", 1, 8)]
    for keep, in_order in variants:
        if left() < 0:
            break
        decoder = Decoder(shape, keep, in_order, plan, device, compiled)
        for kind, sequences, new in work:
            context = new if kind == "prefill" else shape.context
            caches = [
                tuple(
                    decoder._random(sequences * context * shape.kv_heads, shape.head_dim).view(
                        sequences, context, shape.kv_heads, shape.head_dim
                    )
                    for _ in range(2)
                )
                for _ in range(shape.layers)
            ]
            tokens = decoder._random(sequences * new, shape.hidden).view(sequences, new, -1)
            cos, sin = (
                decoder._random(new, shape.head_dim // 2).view(1, new, 1, -1) for _ in range(2)
            )
            with torch.inference_mode():
                run = round_of([partial(decoder.step, tokens, caches, cos, sin)], device)
                run()
                seconds = statistics.median(run() for _ in range(9 if kind == "decode" else 5))
            found.append(
                {
                    "keep": keep,
                    "in_order": in_order,
                    "work": kind,
                    "sequences": sequences,
                    "tokens": sequences * new,
                    "milliseconds": round(seconds * 1e3, 4),
                    "weights_mib": decoder.bytes >> 20,
                }
            )
            del caches, run
        del decoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found
