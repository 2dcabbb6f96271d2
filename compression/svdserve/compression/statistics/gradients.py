"""Gradients of the teacher's loss, block by block, with one block in memory.

The loss is the cross-entropy against tokens drawn from the teacher's own predictions, summed over
tokens. The second moment of its gradients is the true Fisher information, which is the curvature of
the KL divergence from the teacher (Martens, arXiv 1412.1193, section 5). One sweep goes back from
the head to the first block and stores the loss's gradient at every block boundary. When the walk
reaches a block, it computes the gradients inside the block from the stored one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svdserve.compression.format.tensors import save_tensors
from svdserve.compression.model.architecture import Call, Group
from svdserve.compression.model.skeleton import Skeleton

_HEAD_SLICE = 128  # positions whose logits are in memory at the same time


@dataclass(frozen=True)
class Flow:
    """A group's inputs x [B, L, n] and the loss's gradients g [B, L, m] at its stacked outputs."""

    inputs: Tensor
    gradients: Tensor


Watch = Callable[[int, dict[str, Flow]], None]
"""Called for every block and sequence of a sweep, with the block's index and its groups' flows."""


def back_through(
    block: nn.Module, groups: tuple[Group, ...], hidden: Tensor, call: Call, gradient: Tensor
) -> tuple[dict[str, Flow], Tensor]:
    """Run a block forward and backward.

    Args:
        block: the teacher's block; its parameters need no gradient.
        groups: the groups of the block.
        hidden: the block's input [B, L, d].
        call: the other arguments of the block.
        gradient: the loss's gradient [B, L, d] at the block's output.

    Returns:
        The flow of each group by its path, and the loss's gradient [B, L, d] at ``hidden``.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[tuple[str, str], Tensor] = {}

    def keep(path: str, member: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[path] = given[0].detach()
            outputs[path, member] = output

        return hook

    linears = [(group, member) for group in groups for member in group.members]
    hooks = [
        group.linear(block, member).register_forward_hook(keep(group.path, member))
        for group, member in linears
    ]
    args, kwargs = call
    hidden = hidden.detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            result = block(hidden, *args, **kwargs)
            result = result[0] if isinstance(result, tuple) else result
            wanted = [outputs[group.path, member] for group, member in linears]
            grads = torch.autograd.grad(result, [hidden, *wanted], gradient)
    finally:
        for hook in hooks:
            hook.remove()
    rest = iter(grads[1:])
    stacked = {g.path: torch.cat([next(rest) for _ in g.members], dim=-1) for g in groups}
    flows = {
        path: Flow(_in_sequences(inputs[path], hidden), _in_sequences(gradients, hidden))
        for path, gradients in stacked.items()
    }
    return flows, grads[0]


def _in_sequences(value: Tensor, hidden: Tensor) -> Tensor:
    """Reshape [B L, n] to [B, L, n], for blocks that flatten their tokens (Llama 4)."""
    return value.view(*hidden.shape[:2], -1) if value.dim() == 2 else value


def stacked_weights(block: nn.Module, groups: tuple[Group, ...]) -> dict[str, Tensor]:
    """The stacked weight [m, n] of each group, by its path."""
    return {
        group.path: torch.cat(
            [group.linear(block, member).get_parameter("weight") for member in group.members]
        )
        for group in groups
    }


class BoundaryGradients:
    """∂loss/∂h [B, L, d] at the output of every block, for some calibration sequences.

    Each block's gradients are one file in ``folder``, and so are the teacher's hidden states during
    the sweep. Memory therefore does not grow with the number of blocks.

    Args:
        folder: the folder for the files.
        rows: indices of the sequences that have gradients.
        dtype: the dtype of the files; the range of float16 would be too small for gradients.
    """

    def __init__(
        self, folder: Path, rows: Sequence[int], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.folder, self.rows, self.dtype = folder, rows, dtype

    def _file(self, block: int) -> Path:
        return self.folder / f"gradient-{block:05d}.safetensors"

    def _inputs(self, block: int) -> Path:
        return self.folder / f"hidden-{block:05d}.safetensors"

    @property
    def complete(self) -> bool:
        """Whether the sweep is finished; it writes the first block last."""
        return self._file(0).exists()

    def read(self, block: int) -> Tensor:
        """The gradients [B, L, d] of the sequences ``rows`` behind a block, in ``dtype``."""
        gradient: Tensor = load_file(self._file(block))["gradient"]
        return gradient

    def sweep(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        device: torch.device,
        seed: int,
        watch: Watch | None = None,
        done: Callable[[int, nn.Module], None] = lambda _index, _block: None,
    ) -> None:
        """Backpropagate the loss of the sequences ``rows`` to block 0, and store the gradients.

        Args:
            skeleton: the teacher.
            tokens: all calibration tokens [N, L].
            device: the device of the blocks.
            seed: the seed for drawing the targets of the loss.
            watch: called for every block and sequence.
            done: called with the index and the block after each block.

        Raises:
            FloatingPointError: a hidden state, logit or gradient is not finite.
        """
        batches = [tokens[row : row + 1] for row in self.rows]
        embedded = list(skeleton.embed(batches, device))
        hidden = [first.to(self.dtype).cpu() for first, _ in embedded]
        calls = embedded[0][1]  # they do not depend on the tokens
        del embedded
        for index in range(skeleton.blocks):
            save_tensors({"hidden": torch.cat(hidden)}, self._inputs(index))
            block = skeleton.block(index, device)
            args, kwargs = calls[index]
            with torch.no_grad():
                for row, value in enumerate(hidden):
                    result = block(value.to(device).float(), *args, **kwargs)
                    result = result[0] if isinstance(result, tuple) else result
                    hidden[row] = result.to(self.dtype).cpu()
                    if not bool(result.sum().isfinite()):
                        raise FloatingPointError(
                            f"{skeleton.block_name(index)}: the hidden states are not finite"
                        )
        gradients = [g.to(self.dtype) for g in _at_the_head(skeleton, hidden, device, seed)]
        for index in reversed(range(skeleton.blocks)):
            stored = torch.cat(gradients)
            block = skeleton.block(index, device)
            inputs = load_file(self._inputs(index))["hidden"].unsqueeze(1)
            for row, (value, gradient) in enumerate(zip(inputs, gradients, strict=True)):
                flows, upper = back_through(
                    block,
                    skeleton.groups[index],
                    value.to(device).float(),
                    calls[index],
                    gradient.to(device).float(),
                )
                gradients[row] = upper.to(self.dtype).cpu()
                if watch is not None:
                    watch(index, flows)
            done(index, block)
            # Written last, because its existence means that the block is finished.
            save_tensors({"gradient": stored}, self._file(index))
            self._inputs(index).unlink()


def _at_the_head(
    skeleton: Skeleton, hidden: list[Tensor], device: torch.device, seed: int
) -> list[Tensor]:
    """∂loss/∂h [1, L, d] of each sequence at the last block; ``seed`` draws the targets."""
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    with skeleton.head(device) as predict:
        for value in hidden:
            parts = []
            for piece in torch.split(value, _HEAD_SLICE, dim=1):
                inputs = piece.to(device).float().requires_grad_(True)
                with torch.enable_grad():
                    logits = predict(inputs).flatten(0, 1)
                    if not bool(logits.detach().sum().isfinite()):
                        raise FloatingPointError("the logits are not finite")
                    chances = logits.detach().softmax(dim=-1).cpu()
                    drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
                    loss = cross_entropy(logits, drawn.to(device), reduction="sum")
                    parts.append(torch.autograd.grad(loss, inputs)[0])
            gradients.append(torch.cat(parts, dim=1).cpu())
    return gradients
