"""Gradients taken block by block, against autograd through the whole model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from models import ARCHITECTURES, random_tokens, save_model
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.walk.walk import Walk
from svdserve.compression.statistics.gradients import BoundaryGradients, stacked_weights
from svdserve.compression.statistics.moments import Batch, Statistics, Sums, needing_gradients

CPU = torch.device("cpu")
LENGTH, SEED = 40, 7
ROWS = (0, 1, 3)  # of five sequences
WANTED = frozenset({"gram", "gradient_gram", "row_fisher"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_is_the_models_own(architecture: str, tmp_path: Path):
    directory = save_model(architecture, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    skeleton = Skeleton(directory)
    seen: list[Tensor] = []
    last = model.get_submodule(skeleton.layers_name)[-1]
    last.register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(tokens).logits
        list(skeleton.embed([tokens], CPU))
        with skeleton.head(CPU) as predict:
            torch.testing.assert_close(predict(seen[0]), expected)
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert len(skeleton.model.get_submodule(skeleton.layers_name)) == skeleton.blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blockwise_gradients_are_those_of_the_whole_model(architecture: str, tmp_path: Path):
    directory = save_model(architecture, tmp_path / "model")
    skeleton = Skeleton(directory)
    tokens = random_tokens(5, LENGTH)
    gradients = BoundaryGradients(tmp_path, ROWS, torch.float32)
    seen: dict[int, list[dict]] = {index: [] for index in range(skeleton.blocks)}
    assert not gradients.complete
    gradients.sweep(skeleton, tokens, CPU, SEED, watch=lambda i, flows: seen[i].append(flows))
    assert gradients.complete

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    names = [
        f"{skeleton.block_name(index)}.{group.parent}.{member}"
        for index, groups in enumerate(skeleton.groups)
        for group in groups
        for member in group.members
    ]
    for name in names:

        def keep(_m, given, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            inputs[name], outputs[name] = given[0].detach(), output

        model.get_submodule(name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(SEED)
    sums = {
        (index, group.path): Sums(
            needing_gradients(WANTED),
            *stacked_weights(model.get_submodule(skeleton.block_name(index)), (group,))[
                group.path
            ].shape,
            CPU,
        )
        for index, groups in enumerate(skeleton.groups)
        for group in groups
    }
    for place, row in enumerate(ROWS):
        logits = model(tokens[row : row + 1]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        cross_entropy(logits, drawn, reduction="sum").backward()
        for index, groups in enumerate(skeleton.groups):
            flows = seen[index][place]
            for group in groups:
                linears = [
                    f"{skeleton.block_name(index)}.{group.parent}.{m}" for m in group.members
                ]
                expected = torch.cat([outputs[name].grad for name in linears], dim=-1)
                scale = float(expected.abs().max())
                got = flows[group.path]
                torch.testing.assert_close(got.gradients, expected, rtol=0, atol=1e-3 * scale)
                torch.testing.assert_close(got.inputs, inputs[linears[0]], rtol=1e-3, atol=1e-4)
                batch = Batch(teacher=inputs[linears[0]], gradients=expected)
                sums[index, group.path].add(batch)

    # The walk takes the same statistics from the stored boundary gradients, one block at a time.
    walk = Walk(skeleton, tokens, WANTED, torch.float32, CPU, 2, None, gradients)
    for index in range(skeleton.blocks):
        block = walk.block(index)
        for group in block.groups:
            got = block.statistics(group)
            assert got.tokens == tokens.numel()
            expected = sums[index, group.path].into(Statistics(0))
            for key in ("gradient_gram", "row_fisher"):
                value, reference = getattr(got, key), getattr(expected, key)
                tolerance = 1e-3 * float(reference.abs().max())
                torch.testing.assert_close(value, reference, rtol=0, atol=tolerance)
        block.finish()
