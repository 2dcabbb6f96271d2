"""The ``quantization_config`` block that svdserve writes into config.json, version 3.

FORMAT.md in this folder describes the format in prose; legacy.py reads versions 1 and 2.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from svdserve.compression.format import legacy
from svdserve.compression.format.codecs import Codec, get_codec
from svdserve.compression.format.layouts import Layout, get_layout
from svdserve.compression.format.roles import Role
from svdserve.compression.system.errors import UserError

QUANT_METHOD = "svdserve"
FORMAT_VERSION: Literal[3] = 3
FORMAT_VERSIONS = (*legacy.VERSIONS, FORMAT_VERSION)

ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=500)]
MemberName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(\[[0-9]+\])?$", max_length=500)
]


class LinearSpec(BaseModel):
    """A linear of a group that is not factored.

    Attributes:
        role: the role of its group in the block.
        codec: how its weight is encoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role = "other"
    codec: str = "float"

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        return get_codec(name).name


class ModuleSpec(LinearSpec):
    """One factored module: a single linear, or the stacked linears of a group.

    Attributes:
        members: names of the linears that it replaces, in stacking order, relative to the module's
            parent.
        layout: how the weight of rank ``rank`` is stored; ``codec`` encodes its matrices.
        in_features: input channels n.
        out_features: output channels of each member; their sum is m.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    members: tuple[MemberName, ...] = Field(min_length=1)
    layout: str
    rank: PositiveInt
    in_features: PositiveInt = Field(alias="in")
    out_features: tuple[PositiveInt, ...] = Field(alias="out")

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, name: str) -> str:
        return get_layout(name).name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.members) != len(self.out_features):
            raise ValueError(f"{len(self.members)} members but {len(self.out_features)} sizes")
        limit = min(sum(self.out_features), self.in_features)
        if self.rank > limit:
            raise ValueError(f"rank {self.rank} is above min(out, in) = {limit}")
        return self

    @property
    def stacked(self) -> int:
        """Rows m of the stacked weight."""
        return sum(self.out_features)

    def layout_and_codec(self) -> tuple[Layout, Codec]:
        """The layout and the codec of this module."""
        return get_layout(self.layout), get_codec(self.codec)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of this module, by suffix."""
        layout, codec = self.layout_and_codec()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in layout.shapes(self.stacked, self.in_features, self.rank).items():
            if name in layout.indices:
                shapes[name] = shape
            else:
                parts = codec.shapes(shape).items()
                shapes |= {f"{name}{suffix}": size for suffix, size in parts}
        return shapes

    def parameters(self) -> tuple[int, int]:
        """Stored and dense parameters; indices and scales do not count."""
        m, n = self.stacked, self.in_features
        return get_layout(self.layout).parameters(m, n, self.rank), m * n


class CheckpointConfig(BaseModel):
    """The ``quantization_config`` block of an svdserve checkpoint.

    Attributes:
        modules: the factored modules by their full names.
        linears: the linears of the model's groups that are not factored, by their full names. A
            linear that is in neither ``linears`` nor ``modules`` is stored as in the dense model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["svdserve"] = "svdserve"
    format_version: Literal[3] = FORMAT_VERSION
    base_model: str
    keep: float = Field(gt=0, le=1)
    modules: dict[ModuleName, ModuleSpec]
    linears: dict[ModuleName, LinearSpec] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _members_once(self) -> Self:
        owner: dict[str, str] = {}
        for name, spec in self.modules.items():
            if len(spec.members) == 1 and linears_of(name, spec) != [name]:
                raise ValueError(
                    f"{name}: its one member is {spec.members[0]}; it must have the same name"
                )
            for linear in linears_of(name, spec):
                if linear in owner:
                    raise ValueError(f"{linear} is factored by {owner[linear]} and by {name}")
                owner[linear] = name
        for linear in self.linears:
            if linear in owner:
                raise ValueError(f"linears: {linear} belongs to {owner[linear]}")
        return self

    @property
    def owners(self) -> dict[str, str]:
        """Name of the factored module that replaces each factored linear, by the linear's name."""
        return {li: name for name, spec in self.modules.items() for li in linears_of(name, spec)}

    @property
    def encoded_linears(self) -> dict[str, LinearSpec]:
        """The unfactored linears whose codec is not a plain floating-point one."""
        return {
            name: spec for name, spec in self.linears.items() if not get_codec(spec.codec).plain
        }

    def dump(self) -> dict[str, Any]:
        """The block as written to config.json."""
        return self.model_dump(mode="json", by_alias=True)


def parameters_of(modules: Mapping[str, ModuleSpec]) -> tuple[int, int]:
    """Stored and dense parameters of factored modules; indices and scales do not count."""
    each = [spec.parameters() for spec in modules.values()]
    return sum(stored for stored, _ in each), sum(dense for _, dense in each)


def linears_of(module: str, spec: ModuleSpec) -> list[str]:
    """Full names of the linears that ``module`` replaces, in stacking order."""
    parent = module.rpartition(".")[0]
    return [f"{parent}.{member}" if parent else member for member in spec.members]


def parse_config(block: dict[str, Any], source: str = "config.json") -> CheckpointConfig:
    """Validate a ``quantization_config`` block of any version and convert it to version 3.

    Raises:
        UserError: the block is not of svdserve, of an unknown version, or malformed; the message
            names the module.
    """
    version = block.get("format_version")
    if block.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{source}: quant_method is {block.get('quant_method')!r}, not {QUANT_METHOD!r}; "
            "compress the model with `svdserve compress` first"
        )
    if version not in FORMAT_VERSIONS:
        known = ", ".join(map(str, FORMAT_VERSIONS))
        raise UserError(
            f"{source}: format_version {version!r} is not supported (this svdserve reads "
            f"{known}); upgrade svdserve or compress the model again"
        )
    try:
        if version in legacy.VERSIONS:
            block = legacy.upgraded(block)
        return CheckpointConfig.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise UserError(
            f"{source}: {place}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    except ValueError as error:
        raise UserError(f"{source}: quantization_config: {error}") from None
