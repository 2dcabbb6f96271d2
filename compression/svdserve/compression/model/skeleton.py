"""A Hugging Face model whose weights are read from safetensors one block at a time.

The model is built with its parameters on the meta device. Its own code (norms, rotary embedding,
masks, soft-capping) runs unchanged, while only the current block takes memory.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from svdserve.compression.format.tensors import TensorFiles, check_sizes
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.model.architecture import (
    Call,
    Trace,
    find_groups,
    not_taken,
    taken,
)
from svdserve.compression.model.building import (
    build,
    foreign_code,
    load_config,
    nested,
    require_language_head,
)
from svdserve.compression.system.errors import UserError

TESTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


class Skeleton:
    """A model whose parameters stay on the meta device until they are requested.

    Raises:
        UserError: the directory holds no supported model, or its weights are quantised or missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = read_json(directory / "config.json")
        if (block := raw.get("quantization_config")) is not None:
            method = block.get("quant_method") if isinstance(block, dict) else block
            raise UserError(
                f"{directory}: already quantised or compressed ({method}); give the original model"
            )
        self.files = TensorFiles(directory)
        check_sizes(self.files, raw)
        self.config = load_config(directory)
        with init_empty_weights(include_buffers=False):  # rotary tables stay real
            self.model: Any = build(directory, self.config).requires_grad_(False)
        self.model_type = str(self.config.model_type)
        self.layers_name, self.layers = self._find_layers()
        self.blocks = len(self.layers)
        for index, block in enumerate(self.layers):
            if (reason := not_taken(block)) is not None:
                raise self._unsupported(f"block {index} {reason}")
        self._name_as_in_memory()
        self._require_weights()
        require_language_head(directory, self.config)
        self.traces = self._trace_blocks()
        self.groups = [taken(find_groups(trace), trace.name) for trace in self.traces]

    def _name_as_in_memory(self) -> None:
        """Add the prefix that tensor names lack if the base model alone was saved."""
        base = str(getattr(self.model, "base_model_prefix", ""))
        known = {name for name, _ in self.model.named_parameters()}
        known |= {name for name, _ in self.model.named_buffers()}
        found = set(self.files.info)
        if base and not found & known and {f"{base}.{name}" for name in found} & known:
            self.files.add_prefix(base)

    def _require_weights(self) -> None:
        """Raise UserError unless every parameter has a tensor or is tied to one that has."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        missing = [n for n in names if n not in self.files and tied.get(n) not in self.files]
        if not missing:
            return
        if (found := self._other_names(missing[0])) is not None:
            raise self._unsupported(
                f"it calls a weight {missing[0]} in memory and {found} in the files"
                f"{', as mixtures of experts do' if 'expert' in missing[0] + found else ''}; "
                "such weights are not factored yet"
            )
        head = self.model.get_output_embeddings()
        if any(self.model.get_submodule(n.rpartition(".")[0]) is head for n in missing):
            raise UserError(
                f"{self.directory}: has no output head: {missing[0]} is not in the files, and "
                "config.json does not tie it to the embedding; give a causal language model, not a "
                "reward or embedding model"
            )
        raise UserError(
            f"{self.directory}: weight {missing[0]} is missing from the safetensors; copy the "
            "whole model again"
        )

    def _other_names(self, missing: str) -> str | None:
        """A tensor in the same block as ``missing`` whose name the model does not know."""
        known = {name for name, _ in self.model.named_parameters()}
        known |= {name for name, _ in self.model.named_buffers()}
        prefix = f"{self.layers_name}."
        if not missing.startswith(prefix):
            return None
        block = prefix + missing.removeprefix(prefix).partition(".")[0] + "."
        others = (n for n in self.files.info if n.startswith(block) and n not in known)
        return next(others, None)

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == getattr(
                self.config, "num_hidden_layers", -1
            ):
                return name, module
        if getattr(self.config, "text_config", None) is not None:
            raise nested(self.directory, self.model_type)
        raise self._unsupported("it has no list of num_hidden_layers blocks")

    def _trace_blocks(self) -> list[Trace]:
        """A trace of every block with the decoder's arguments."""
        two, cpu = torch.tensor([[0, 1]]), torch.device("cpu")
        ((hidden, calls),) = self.embed([two], cpu, weights=False)
        return [
            Trace(block, call, hidden.shape, self.block_name(index))
            for index, (block, call) in enumerate(zip(self.layers, calls, strict=True))
        ]

    def _unsupported(self, reason: str) -> UserError:
        return UserError(
            f"architecture {self.model_type!r} is not supported: {reason}; tested: "
            f"{', '.join(TESTED)}; serve the dense model, or give one whose blocks have q_proj, "
            "k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj exactly once"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most parameters of the blocks' linears are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for index, groups in enumerate(self.groups):
            for group in groups:
                for member in group.members:
                    name = ".".join(filter(None, (self.block_name(index), group.parent, member)))
                    info = self.files.info[f"{name}.weight"]
                    sizes[info.dtype] += info.nbytes // info.dtype.itemsize
        return sizes.most_common(1)[0][0]

    def block_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    def block(self, index: int, device: torch.device) -> nn.Module:
        """Block ``index`` with its weights in float32."""
        block = copy.deepcopy(self.layers[index])
        self._fill(block, self.block_name(index), device, torch.float32)
        return block

    def _fill(
        self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        for path, owner in module.named_modules(prefix=name):
            for key, parameter in owner.named_parameters(recurse=False):
                full = f"{path}.{key}"
                tensor = self.files.load([full])[full]
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"{self.directory}: {full} is {list(tensor.shape)}, but config.json asks "
                        f"for {list(parameter.shape)}; copy the whole model again"
                    )
                value = tensor.to(device=device, dtype=dtype or tensor.dtype)
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
        module.to(device)

    def embed(
        self, batches: list[Tensor], device: torch.device, *, weights: bool = True
    ) -> Iterator[tuple[Tensor, list[Call]]]:
        """Run the decoder without its blocks and record its calls of them, batch by batch.

        Yields the first block's hidden states [B, L, d] in float32 and, for every block, the other
        arguments of its call (rotary embedding, mask, positions), which do not depend on the
        tokens. If ``weights`` is False, no file is read; shapes are right but parameters are zeros.
        """
        fill = self._fill if weights else _fill_with_zeros
        decoder = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        attribute = self.layers_name.rpartition(".")[2]
        # Filled before the first call, because some decoders move the tokens to the embedding's
        # device (Llama 4).
        embedding = decoder.get_input_embeddings()
        name = next(path for path, module in self.model.named_modules() if module is embedding)
        fill(embedding, name, device, None)
        filled: list[nn.Module] = [embedding]
        hooks = [
            module.register_forward_pre_hook(_filler(fill, path, device, filled))
            for path, module in self._outside()
        ]
        # Cast to float32, because the rotary embedding takes its dtype from the hidden states.
        hooks += [
            module.register_forward_hook(lambda _module, _args, output: output.float())
            for _, module in self._outside()
            if isinstance(module, nn.Embedding)
        ]
        for module in decoder.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(device)
        recorders = _Recorders(self.blocks)
        setattr(decoder, attribute, recorders.modules)

        def run(tokens: Tensor) -> tuple[Tensor, list[Call]]:
            with foreign_code(
                f"architecture {self.model_type!r}", "its decoder fails without its blocks"
            ):
                return recorders.record(lambda: decoder(input_ids=tokens, use_cache=False))

        try:
            with torch.no_grad():
                for batch in batches:
                    yield run(batch.to(device))
        finally:
            for hook in hooks:
                hook.remove()
            setattr(decoder, attribute, self.layers)
            for module in filled:
                _empty(module)

    def _outside(self) -> list[tuple[str, nn.Module]]:
        """The modules outside the blocks that have parameters of their own."""
        return [
            (path, module)
            for path, module in self.model.named_modules()
            if not f"{path}.".startswith(f"{self.layers_name}.")
            and any(True for _ in module.parameters(recurse=False))
        ]

    @contextmanager
    def head(self, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from the last block's output to the logits, with the head loaded.

        The function takes hidden states [B, L, d] and returns float32 logits [B, L, vocabulary]. It
        applies the model's own final norm, output head and soft-capping or scaling of logits.
        """
        decoder = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        attribute = self.layers_name.rpartition(".")[2]
        inputs = self.model.get_input_embeddings()
        embedding = next(name for name, other in self.model.named_modules() if other is inputs)
        outside = [(path, module) for path, module in self._outside() if module is not inputs]
        for path, module in outside:
            # A tied head has no tensor of its own; _require_weights has checked that it is tied.
            source = path if f"{path}.weight" in self.files else embedding
            self._fill(module, source, device, torch.float32)
        last = _Given()
        setattr(decoder, attribute, nn.ModuleList([last]))

        def predict(hidden: Tensor) -> Tensor:
            last.hidden = hidden
            logits = self.model(inputs_embeds=hidden.detach(), use_cache=False).logits
            assert isinstance(logits, Tensor)
            return logits

        try:
            yield predict
        finally:
            setattr(decoder, attribute, self.layers)
            for _, module in outside:
                _empty(module)


_Fill = Callable[[nn.Module, str, torch.device, torch.dtype | None], None]
"""Loads the weights of a named module to a device, in a dtype or, if None, the stored dtype."""


def _filler(
    fill: _Fill, path: str, device: torch.device, filled: list[nn.Module]
) -> Callable[[nn.Module, Any], None]:
    """A hook that loads a module's weights when the decoder first calls it."""

    def hook(module: nn.Module, given: Any) -> None:
        if any(isinstance(value, Tensor) and value.is_meta for value in given):
            raise RuntimeError(f"{path} is called with tensors that have no values")
        if module not in filled:
            # A table of embeddings is large and only few rows are read, so it keeps its dtype.
            dtype = None if isinstance(module, nn.Embedding) else torch.float32
            fill(module, path, device, dtype)
            filled.append(module)

    return hook


def _fill_with_zeros(
    module: nn.Module, _name: str, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Fill a module with expanded zeros, which take no memory."""
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            zero = torch.zeros((), dtype=dtype or parameter.dtype, device=device)
            value = zero.expand(parameter.shape)
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)
    module.to(device)


def _empty(module: nn.Module) -> None:
    """Free the memory of a module's parameters; its buffers stay."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _Given(nn.Module):
    """Replaces all blocks: returns the hidden states that ``hidden`` holds, with their graph."""

    hidden: Tensor

    def forward(self, _hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.hidden


class _LastBlock(Exception):
    """Stops the decoder after its last block, because later modules have no weights."""


class _Recorders:
    """Replaces the blocks of a decoder by modules that record their calls."""

    def __init__(self, blocks: int) -> None:
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None
        self.in_tuple = False
        self.modules = nn.ModuleList(_Recorder(self, i == blocks - 1) for i in range(blocks))

    def record(self, run: Callable[[], object]) -> tuple[Tensor, list[Call]]:
        """Run the decoder; the first block's hidden states, and every block's other arguments.

        Raises:
            UserError: the decoder changes the hidden states between its blocks.
        """
        for in_tuple in dict.fromkeys((self.in_tuple, True)):
            self.in_tuple, self.calls, self.hidden = in_tuple, [], None
            with suppress(_LastBlock, _Changed):
                run()
            if self.hidden is not None and len(self.calls) == len(self.modules):
                return self.hidden, self.calls
        raise UserError(
            "this architecture is not supported: its decoder changes the hidden states between "
            "its blocks"
        )


class _Changed(Exception):
    """A block got other hidden states than the block before it returned."""


class _Recorder(nn.Module):
    """Replaces a block: records its call and returns the hidden states unchanged."""

    def __init__(self, all_: _Recorders, last: bool) -> None:
        super().__init__()
        self._all, self._last = all_, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        every = self._all
        if every.hidden is None:
            every.hidden = hidden_states
        elif hidden_states is not every.hidden:
            raise _Changed
        every.calls.append((args, kwargs))
        if self._last:
            raise _LastBlock
        return (hidden_states,) if every.in_tuple else hidden_states
