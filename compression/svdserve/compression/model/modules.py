"""The torch modules of a factored model: what stands in a block where dense linears stood.

The transformers quantizer plug-in builds them before it loads weights, and the block walk puts
them into the student. Their parameter names are the tensor names of the checkpoint. Those with int8
weights widen them at every call: exact, for evaluation; vLLM also rounds the activations.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdserve.compression.format.factors import Factors
from svdserve.compression.format.int8 import dequantized
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.system.errors import UserError
from svdserve.kernels import lowrank_linear
from svdserve.kernels.reference import project

# PEFT prints a module that it cannot put an adapter on, and nothing else of ours.
_NO_ADAPTERS = "factored, takes no PEFT adapter: merge it into the dense model and compress that"


class FactoredWeight(nn.Module):
    """The tensors of one ModuleSpec, from ``factors`` or, when None, uninitialised.

    Parameters ``factor_in`` and ``factor_out`` and, for the interpolative layout, the int32 buffer
    ``pivots``; shapes as in factors.py. In int8 also the parameters ``factor_in_scale`` and
    ``factor_out_scale``; only the weights are rounded then, and products are in the dtype of x.
    """

    factor_in: nn.Parameter
    factor_out: nn.Parameter
    pivots: Tensor | None
    scale: Tensor | None = None
    """[r], multiplies the rank-r vectors; set while scores of the components are learned."""

    def __init__(
        self,
        spec: ModuleSpec,
        factors: Factors | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = spec.in_features
        self.out_features = spec.stacked
        self.rank = spec.rank
        self.layout = spec.layout
        self.register_buffer("pivots", None)
        trainable = spec.weights == "float"
        for name, shape in spec.tensors().items():
            kind = dtype if trainable else torch.int8
            if name == "pivots":
                kind = torch.int32
            elif name.endswith("_scale"):
                kind = torch.float32
            if factors is None:
                tensor = torch.empty(shape, dtype=kind, device=device)
            else:
                tensor = getattr(factors, name).to(device=device, dtype=kind)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
            if name == "pivots":
                self.pivots = tensor
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=trainable))

    def factors(self) -> Factors:
        """The tensors, without a copy and outside the autograd graph."""
        scales = {
            name: parameter.detach()
            for name, parameter in self.named_parameters(recurse=False)
            if name.endswith("_scale")
        }
        return Factors(self.factor_in.detach(), self.factor_out.detach(), self.pivots, **scales)

    def matrix(self, name: str, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of ``factor_in`` or ``factor_out`` to multiply activations of ``dtype`` with."""
        values: Tensor = getattr(self, name)[rows]
        scale = getattr(self, f"{name}_scale", None)
        return values if scale is None else dequantized(values, scale[rows], dtype)

    def thaw(self) -> None:
        """Turn int8 factors into float32 parameters of the same values, which can be trained."""
        for name in ("factor_in", "factor_out"):
            if hasattr(self, f"{name}_scale"):
                setattr(self, name, nn.Parameter(self.matrix(name, torch.float32)))
                delattr(self, f"{name}_scale")

    def project(self, x: Tensor) -> Tensor:
        """The rank-r vectors [..., r] of x [..., n]."""
        value = project(x, self.matrix("factor_in", x.dtype), self.pivots)
        return value if self.scale is None else value * self.scale

    def extra_repr(self) -> str:
        sizes = f"in={self.in_features}, out={self.out_features}, rank={self.rank}"
        return f"{sizes}, {self.layout}; {_NO_ADAPTERS}"


class LowRankLinear(FactoredWeight):
    """One linear of rank r: [..., n] to [..., m]."""

    bias: Tensor | None

    def __init__(
        self,
        spec: ModuleSpec,
        factors: Factors | None,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(spec, factors, dtype, device)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.matrix("factor_out", x.dtype)
        if self.scale is not None:
            return linear(self.project(x), outer, self.bias)
        inner = self.matrix("factor_in", x.dtype)
        return lowrank_linear(x, inner, outer, self.pivots, self.bias)


@dataclass
class _Projection:
    """The rank-r vectors of one input, and the members that have not used them yet."""

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

    The projection to rank r is computed by the first member called and reused by the others. It is
    recognised by the identity of the input tensor and dropped as soon as every member has used it,
    the input dies, or a gradient has passed through it; a member uses it at most once.
    """

    _memo: _Projection | None

    def __init__(
        self,
        spec: ModuleSpec,
        factors: Factors | None,
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
        return linear(self._project(x, member), self.matrix("factor_out", x.dtype, rows), bias)

    def _project(self, x: Tensor, member: int) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler removes the common subexpression itself
            return self.project(x)
        memo = self._memo
        if memo is None or not memo.serves(x, member):
            value = self.project(x)
            members = set(range(len(self.sizes)))
            source = weakref.ref(x, self._forget)
            memo = _Projection(source, _version(x), torch.is_grad_enabled(), value, members)
            if value.requires_grad:  # a second backward could not pass through a freed graph
                value.register_hook(self._forget)  # type: ignore[no-untyped-call]
        memo.waiting.discard(member)
        self._memo = memo if memo.waiting else None
        return memo.value

    def _forget(self, _: object) -> None:
        self._memo = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles carry no activation."""
        return {**self.__dict__, "_memo": None}


class SharedMember(nn.Module):
    """One linear of a group: a slice of the stacked output of its SharedFactors."""

    bias: Tensor | None

    def __init__(self, shared: SharedFactors, member: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        # In a tuple, so that torch does not register it here and store its tensors twice;
        # deepcopy of a block still maps it to the copied SharedFactors.
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


class Int8Linear(nn.Module):
    """A dense linear [..., n] to [..., m] with an int8 weight [m, n], and its scales [m]."""

    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, device: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.empty(out_features, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, dequantized(self.weight, self.weight_scale, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}"


def replace_group(
    parent: nn.Module,
    module_name: str,
    spec: ModuleSpec,
    factors: Factors | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put factored modules where ``parent`` holds the linears of one group.

    The biases of the linears stay the same parameters. Linears that are factored already are
    replaced too.

    Args:
        parent: the module that holds the linears, such as ``layers[0].self_attn``.
        module_name: last part of the module's name, such as ``qkv_proj``; state-dict names become
            ``<parent>.<module_name>.factor_in`` and so on.
        spec: members, layout, rank and sizes.
        factors: the tensors, or None for uninitialised ones that a loader fills.
        dtype, device: of the factors.

    Raises:
        UserError: a member does not exist or has other sizes than ``spec`` says.
    """
    for member, size in zip(spec.members, spec.out_features, strict=True):
        old = getattr(parent, member, None)
        have = (getattr(old, "out_features", None), getattr(old, "in_features", None))
        if have != (size, spec.in_features):
            found = "none" if old is None else f"{type(old).__name__} {list(have)}"
            raise UserError(
                f"{module_name}: the checkpoint has a linear {member} [{size}, {spec.in_features}]"
                f" and the model has {found}; config.json does not belong to these weights"
            )
    biases = [getattr(parent, member).bias for member in spec.members]
    if spec.members == (module_name,):
        setattr(parent, module_name, LowRankLinear(spec, factors, biases[0], dtype, device))
        return
    shared = SharedFactors(spec, factors, dtype, device)
    setattr(parent, module_name, shared)
    for index, (member, bias) in enumerate(zip(spec.members, biases, strict=True)):
        setattr(parent, member, SharedMember(shared, index, bias))


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a model or a block by their names; everything else is frozen.

    Int8 factors become float32 ones.
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
        if suffix.startswith("factor")
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _version(x: Tensor) -> int | None:
    """Changes when ``x`` is written in place; inference tensors do not count."""
    return None if x.is_inference() else x._version
