"""The ``quantization_config`` block that svdserve writes into config.json, versions 1 and 2.

FORMAT.md in this folder describes the format in prose. This module imports pydantic only, so that
every reader (transformers, vLLM, tools) can share it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from svdserve.compression.format.factors import Layout
from svdserve.compression.format.int8 import Weights
from svdserve.compression.system.errors import UserError

QUANT_METHOD = "svdserve"
FLOAT_VERSION: Literal[1] = 1
INT8_VERSION: Literal[2] = 2
FORMAT_VERSIONS = (FLOAT_VERSION, INT8_VERSION)

# One stacked weight per group; the names are those of vLLM's merged layers.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=500)]


class ModuleSpec(BaseModel):
    """One factored module: a single linear, or the stacked linears of a group."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    members: tuple[str, ...] = Field(min_length=1)
    layout: Layout
    rank: PositiveInt
    in_features: PositiveInt = Field(alias="in")
    out_features: tuple[PositiveInt, ...] = Field(alias="out")
    weights: Weights = "float"

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Version 1 has no ``weights``."""
        fields: dict[str, Any] = handler(self)
        if self.weights == "float":
            del fields["weights"]
        return fields

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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of this module, by its suffix."""
        pair = self.layout == "pair"
        shapes: dict[str, tuple[int, ...]] = {
            "factor_in": (self.rank, self.in_features - (0 if pair else self.rank)),
            "factor_out": (self.stacked, self.rank),
        }
        if not pair:
            shapes["pivots"] = (self.rank,)
        if self.weights == "int8":
            shapes |= {"factor_in_scale": (self.rank,), "factor_out_scale": (self.stacked,)}
        return shapes


class CheckpointConfig(BaseModel):
    """The ``quantization_config`` block of an svdserve checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["svdserve"] = "svdserve"
    format_version: Literal[1, 2] = 1
    base_model: str
    keep: float = Field(gt=0, le=1)
    modules: dict[ModuleName, ModuleSpec]
    int8_linears: tuple[ModuleName, ...] = ()
    """Dense linears whose weights are int8, by their full names."""
    recipe: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_its_version(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.format_version == FLOAT_VERSION:
            del fields["int8_linears"]
        return fields

    @model_validator(mode="after")
    def _version_has_int8(self) -> Self:
        first = next((name for name, spec in self.modules.items() if spec.weights == "int8"), None)
        first = first or next(iter(self.int8_linears), None)
        if self.format_version == FLOAT_VERSION and first is not None:
            raise ValueError(f"{first}: int8 weights need format_version {INT8_VERSION}")
        return self

    @model_validator(mode="after")
    def _members_once(self) -> Self:
        owner: dict[str, str] = {}
        for name, spec in self.modules.items():
            expected = GROUPS.get(name.rpartition(".")[2], (name.rpartition(".")[2],))
            if spec.members != expected:
                raise ValueError(f"{name}: members {list(spec.members)}, expected {list(expected)}")
            for linear in linears_of(name, spec):
                if linear in owner:
                    raise ValueError(f"{linear} is factored by {owner[linear]} and by {name}")
                owner[linear] = name
        for linear in self.int8_linears:
            if linear in owner:
                raise ValueError(f"int8_linears: {linear} belongs to {owner[linear]}")
            owner[linear] = "int8_linears"
        return self

    @property
    def owners(self) -> dict[str, str]:
        """Factored module of each factored linear, by the linear's full name."""
        return {li: name for name, spec in self.modules.items() for li in linears_of(name, spec)}

    def dump(self) -> dict[str, Any]:
        """The block as written to config.json."""
        return self.model_dump(mode="json", by_alias=True)


def linears_of(module: str, spec: ModuleSpec) -> list[str]:
    """Full names of the linears that ``module`` stands for, in stacking order."""
    parent = module.rpartition(".")[0]
    return [f"{parent}.{member}" if parent else member for member in spec.members]


def parse_config(block: dict[str, Any], source: str = "config.json") -> CheckpointConfig:
    """Check a ``quantization_config`` block.

    Raises:
        UserError: it is no svdserve block, of an unknown version, or malformed; names the module.
    """
    version = block.get("format_version")
    if block.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{source}: quant_method is {block.get('quant_method')!r}, not {QUANT_METHOD!r}; "
            "compress the model with `svdserve compress` first"
        )
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise UserError(
            f"{source}: format_version {version!r} is not supported (this svdserve reads "
            f"{known}); upgrade svdserve or compress the model again"
        )
    try:
        return CheckpointConfig.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise UserError(f"{source}: {place}: {first['msg']}") from None
