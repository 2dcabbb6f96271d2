"""Round a model to int4 with compressed-tensors, in the form that vLLM serves on a CPU too.

    python benchmarks/int4.py MODEL OUT

Weights are symmetric int4 in groups of 64 columns with a scale each, the nearest level of the scale
that loses least; activations stay in 16 bits (W4A16, `pack-quantized`). The embedding and the
output head stay as they are.
"""

import argparse
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from transformers import AutoModelForCausalLM

GROUP = 64  # columns; vLLM's CPU kernel wants a multiple of 32
SHRINKS = tuple(1 - 0.05 * step for step in range(9))  # of a group's largest magnitude


def write_int4(source: Path, out: Path) -> None:
    """Write the int4 checkpoint of the model in ``source`` to ``out``, which appears complete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    weights = QuantizationArgs(
        num_bits=4,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=GROUP,
    )
    packed = CompressionFormat.pack_quantized
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=packed)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=packed.value, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            choose_scales(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=packed.value)
    compressor.compress_model(model)
    model.save_pretrained(partial)
    compressor.update_config(str(partial))
    for file in source.iterdir():
        copy = partial / file.name
        if file.is_file() and ".safetensors" not in file.name and not copy.exists():
            shutil.copyfile(file, copy)
    partial.rename(out)


@torch.no_grad()
def choose_scales(linear: nn.Linear, arguments: QuantizationArgs) -> None:
    """Give each group the scale, of nine, whose levels are nearest to the weights."""
    groups = linear.weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    least, best = torch.full_like(low, torch.inf), torch.empty_like(low)
    for shrink in SHRINKS:
        scale, _ = calculate_qparams(low * shrink, high * shrink, arguments)
        scale = scale.to(linear.weight.dtype).float()  # as it will be stored
        levels = (groups / scale[..., None]).round().clamp(-8, 7)
        error = (levels * scale[..., None] - groups).square().sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    linear.weight_scale.data.copy_(best)  # type: ignore[union-attr, operator]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    write_int4(given.source, given.out)
