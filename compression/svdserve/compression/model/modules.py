"""The torch modules that replace dense linears in a factored model.

The transformers quantizer plug-in builds them before it loads weights, and the block walk puts
them into the student. Their parameter names are the tensor names of the checkpoint. Encoded
matrices are decoded at every call. The server's int8 products also round the activations. The
students of the block walk and of the refinement do the same (``imitated``); a model that
transformers loads does not.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdserve.compression.format.codecs import FLOAT, Codec, get_codec
from svdserve.compression.format.codecs.base import decoded
from svdserve.compression.format.layouts import Layout
from svdserve.compression.format.schema import LinearSpec, ModuleSpec
from svdserve.compression.format.stored import StoredFactors
from svdserve.compression.system.errors import UserError
from svdserve.kernels import lowrank_linear
from svdserve.kernels.reference import Rounding, straight_through

# PEFT prints the module that it cannot adapt, so the repr is the only place for this hint.
_NO_ADAPTERS = "factored, takes no PEFT adapter: merge it into the dense model and compress that"


class EncodedModule(nn.Module):
    """A module that holds tensors under their names in a checkpoint, and decodes them on use.

    Tensors of plain codecs are trainable parameters in the dtype of the model. Tensors of other
    codecs are frozen parameters, and indices are buffers.
    """

    codec: Codec
    imitated: Codec | None = None
    """The codec whose ``round_input`` products apply to their inputs; None for no rounding."""

    @property
    def round_input(self) -> Rounding | None:
        return None if self.imitated is None else self.imitated.round_input

    def _hold(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Register the uninitialised tensors of a matrix [m, n]."""
        for suffix, size in self.codec.shapes(shape).items():
            kind = dtype if self.codec.plain else self.codec.dtypes(suffix)[0]
            tensor = torch.empty(size, dtype=kind, device=device)
            parameter = nn.Parameter(tensor, requires_grad=self.codec.plain)
            self.register_parameter(f"{name}{suffix}", parameter)

    def matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """A matrix for products with activations of ``dtype``."""
        if self.codec.plain:
            # Not cast: the caller computes in the dtype of the parameters or under autocast.
            plain: Tensor = getattr(self, name)
            return plain
        return decoded(self.codec, name, self._tensors(), dtype)

    def _tensors(self) -> dict[str, Tensor]:
        return dict([*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)])


class FactoredWeight(EncodedModule):
    """The tensors of one ModuleSpec, taken from ``factors`` or, if None, uninitialised.

    Matrices are parameters and indices are buffers; their names are the suffixes (format/layouts).
    Products are in the dtype of x.
    """

    component_scale: Tensor | None = None
    """[r], multiplies the latent while the scores of components are learned."""

    def __init__(
        self,
        spec: ModuleSpec,
        factors: StoredFactors | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = spec.in_features
        self.out_features = spec.stacked
        self.rank = spec.rank
        self.layout, self.codec = spec.layout_and_codec()
        shapes = self.layout.shapes(spec.stacked, spec.in_features, spec.rank)
        for name in self.layout.matrices:
            self._hold(name, shapes[name], dtype, device)
        for name in self.layout.indices:
            index = torch.empty(shapes[name], dtype=torch.int32, device=device)
            self.register_buffer(name, index)
        if factors is not None:
            self._take(factors)

    @torch.no_grad()
    def _take(self, factors: StoredFactors) -> None:
        mine = self._tensors()
        for name, tensor in factors.tensors.items():
            if tensor.shape != mine[name].shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(mine[name].shape)}")
            mine[name].copy_(tensor)

    def factors(self) -> StoredFactors:
        """The tensors, without a copy and outside the autograd graph."""
        names = [f"{m}{s}" for m in self.layout.matrices for s in self.codec.suffixes]
        mine = self._tensors()
        tensors = {name: mine[name].detach() for name in (*names, *self.layout.indices)}
        return StoredFactors(self.layout, self.codec, tensors)

    def tensors(self, dtype: torch.dtype) -> "Decoded":
        """Matrices and indices by suffix, for products with activations of ``dtype``."""
        return Decoded(self, dtype)

    def thaw(self) -> None:
        """Replace encoded matrices by trainable float32 parameters of the same values."""
        if self.codec.plain:
            return
        values = {name: self.matrix(name, torch.float32) for name in self.layout.matrices}
        for name, value in values.items():
            for suffix in self.codec.suffixes:
                delattr(self, f"{name}{suffix}")
            setattr(self, name, nn.Parameter(value))
        self.codec = FLOAT

    def latent(self, x: Tensor) -> Tensor:
        """The latent [..., r] of x [..., n], as factor_out takes it."""
        value = self.layout.latent(x, self.tensors(x.dtype), self.round_input)
        value = value if self.component_scale is None else value * self.component_scale
        return straight_through(value, self.round_input)

    def extra_repr(self) -> str:
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank}"
        return f"{sizes}, {self.layout.name}; {_NO_ADAPTERS}"


class Decoded(Mapping[str, Tensor]):
    """The matrices and indices of a module; a matrix is decoded at each access."""

    def __init__(self, module: FactoredWeight, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getitem__(self, name: str) -> Tensor:
        layout = self._module.layout
        if name in layout.matrices:
            return self._module.matrix(name, self._dtype)
        if name in layout.indices:
            return self._module.get_buffer(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._module.layout.matrices, *self._module.layout.indices))

    def __len__(self) -> int:
        return len(self._module.layout.matrices) + len(self._module.layout.indices)


class LowRankLinear(FactoredWeight):
    """One linear of rank r: [..., n] to [..., m]."""

    bias: Tensor | None

    def __init__(
        self,
        spec: ModuleSpec,
        factors: StoredFactors | None,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(spec, factors, dtype, device)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        part = self.layout.part(self.tensors(x.dtype))
        if self.component_scale is not None or self.imitated is not None:
            return linear(self.latent(x), part.factor_out, self.bias)
        return lowrank_linear(x, *part, self.bias)


@dataclass
class _Latent:
    """The latent of one input tensor, and the members that have not used it yet."""

    source: "weakref.ref[Tensor]"
    version: int | None
    with_grad: bool
    value: Tensor
    waiting: set[int] = field(default_factory=set)

    def serves(self, x: Tensor, member: int) -> bool:
        return (
            self.source() is x
            and self.version == _version(x)
            and self.with_grad == torch.is_grad_enabled()
            and member in self.waiting
        )


class SharedFactors(FactoredWeight):
    """The stacked weight of a group whose members are called in turn with the same input tensor.

    The first member that is called computes the latent, and the others reuse it if their input is
    the same tensor object. The latent is dropped when every member has used it, when the input is
    freed, or when a gradient has passed through it. A member uses a latent at most once.
    """

    _memo: _Latent | None

    def __init__(
        self,
        spec: ModuleSpec,
        factors: StoredFactors | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(spec, factors, dtype, device)
        self.sizes = spec.out_features
        self._memo = None

    def forward(self, x: Tensor, member: int, bias: Tensor | None) -> Tensor:
        """Output [..., sizes[member]] of one member for x [..., n]."""
        start = sum(self.sizes[:member])
        rows = slice(start, start + self.sizes[member])
        outer = self.layout.part(self.tensors(x.dtype)).factor_out[rows]
        return linear(self._shared_latent(x, member), outer, bias)

    def _shared_latent(self, x: Tensor, member: int) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler removes the common subexpression itself
            return self.latent(x)
        memo = self._memo
        if memo is None or not memo.serves(x, member):
            value = self.latent(x)
            members = set(range(len(self.sizes)))
            source = weakref.ref(x, self._forget)
            memo = _Latent(source, _version(x), torch.is_grad_enabled(), value, members)
            if value.requires_grad:  # backward frees the latent's graph, so it cannot be reused
                value.register_hook(self._forget)  # type: ignore[no-untyped-call]
        memo.waiting.discard(member)
        self._memo = memo if memo.waiting else None
        return memo.value

    def _forget(self, _: object) -> None:
        self._memo = None

    def __getstate__(self) -> dict[str, object]:
        """Leave the latent out of copies and pickles."""
        return {**self.__dict__, "_memo": None}


class SharedMember(nn.Module):
    """One linear of a group: a slice of the stacked output of its SharedFactors."""

    bias: Tensor | None

    def __init__(self, shared: SharedFactors, member: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        # The tuple hides the module from torch, which would register it here and store its tensors
        # twice. deepcopy of a block still maps it to the copied SharedFactors.
        self._shared = (shared,)
        self.member = member
        self.in_features = shared.in_features
        self.out_features = shared.sizes[member]
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._shared[0](x, self.member, self.bias)
        return output

    def extra_repr(self) -> str:
        sizes = f"in={self.in_features}, out={self.out_features}, member={self.member}"
        return f"{sizes}; {_NO_ADAPTERS}"


class EncodedLinear(EncodedModule):
    """An unfactored linear, [..., n] to [..., m], with an encoded weight [m, n]."""

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.codec = get_codec(spec.codec)
        self._hold("weight", (out_features, in_features), dtype, device)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = straight_through(x, self.round_input)
        return linear(x, self.matrix("weight", x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.codec.name}"


def replace_group(
    parent: nn.Module,
    module_name: str,
    spec: ModuleSpec,
    factors: StoredFactors | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Replace the linears of one group in ``parent`` by factored modules.

    The new modules keep the bias parameters of the linears. Linears that are already factored are
    replaced too.

    Args:
        parent: the module that holds the linears, such as ``layers[0].self_attn``.
        module_name: last part of the module's name, such as ``qkv_proj``; its tensors get names
            like ``<parent>.<module_name>.factor_in``.
        spec: members, layout, codec, rank and sizes.
        factors: the tensors, or None for uninitialised ones that a loader fills.
        dtype, device: dtype and device of the factors.

    Raises:
        UserError: a member does not exist or its sizes differ from ``spec``, or ``parent`` already
            has something else called ``module_name``.
    """
    for member, size in zip(spec.members, spec.out_features, strict=True):
        old = getattr(parent, member, None)
        have = (getattr(old, "out_features", None), getattr(old, "in_features", None))
        if have != (size, spec.in_features):
            found = "none" if old is None else f"{type(old).__name__} {list(have)}"
            raise UserError(
                f"{module_name}: the checkpoint has a linear {member} [{size}, {spec.in_features}]"
                f" but the model has {found}; config.json does not belong to these weights"
            )
    taken = getattr(parent, module_name, None)
    if module_name not in spec.members and not isinstance(taken, SharedFactors | None):
        raise UserError(
            f"{module_name}: the checkpoint has a module of this name, but the model has a "
            f"{type(taken).__name__} there; config.json does not belong to these weights"
        )
    biases = [getattr(parent, member).bias for member in spec.members]
    if spec.members == (module_name,):
        setattr(parent, module_name, LowRankLinear(spec, factors, biases[0], dtype, device))
        return
    shared = SharedFactors(spec, factors, dtype, device)
    setattr(parent, module_name, shared)
    for index, (member, bias) in enumerate(zip(spec.members, biases, strict=True)):
        setattr(parent, member, SharedMember(shared, index, bias))


def imitate_server(model: nn.Module) -> None:
    """Round the inputs of all products with encoded matrices as their codecs say."""
    for module in model.modules():
        if isinstance(module, FactoredWeight):
            module.imitated = served_codec(module.codec, module.layout)
        elif isinstance(module, EncodedLinear):
            module.imitated = served_codec(module.codec)


def served_codec(codec: Codec, layout: Layout | None = None) -> Codec | None:
    """The codec of what the server multiplies; None if that is decoded when it is loaded.

    Args:
        codec: the codec that a weight or its factors are stored by.
        layout: the layout of the factors; None for a whole weight.
    """
    decoded_then = layout is not None and layout.decoded_when_served
    return None if decoded_then or codec.plain or codec.axes is None else codec


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Make the factors of a model or block trainable and freeze all else; the factors by name.

    Encoded factors become float32 parameters.
    """
    for module in model.modules():
        if isinstance(module, FactoredWeight):
            module.thaw()
    model.requires_grad_(False)
    found = {
        f"{path}.{suffix}": parameter
        for path, module in model.named_modules()
        if isinstance(module, FactoredWeight)
        for suffix, parameter in module.named_parameters(recurse=False)
        if suffix in module.layout.matrices
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _version(x: Tensor) -> int | None:
    """A number that changes with each in-place write to ``x``; None for inference tensors."""
    return None if x.is_inference() else x._version
