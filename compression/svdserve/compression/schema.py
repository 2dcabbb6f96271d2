"""Version 1 of the ``quantization_config`` block that svdserve writes into config.json.

FORMAT.md in this folder describes the format in prose. This module imports pydantic only, so that
every reader (transformers, vLLM, tools) can share it.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from svdserve.compression.errors import UserError
from svdserve.compression.factors import Layout

QUANT_METHOD = "svdserve"
FORMAT_VERSION = 1

# One stacked weight per group; the names are those of vLLM's merged layers.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


class ModuleSpec(BaseModel):
    """One factored module: a single linear, or the stacked linears of a group."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    members: tuple[str, ...] = Field(min_length=1)
    layout: Layout
    rank: PositiveInt
    in_features: PositiveInt = Field(alias="in")
    out_features: tuple[PositiveInt, ...] = Field(alias="out")

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
        if self.layout == "pair":
            return {
                "factor_in": (self.rank, self.in_features),
                "factor_out": (self.stacked, self.rank),
            }
        return {
            "factor_in": (self.rank, self.in_features - self.rank),
            "factor_out": (self.stacked, self.rank),
            "pivots": (self.rank,),
        }


class CheckpointConfig(BaseModel):
    """The ``quantization_config`` block of an svdserve checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["svdserve"] = "svdserve"
    format_version: Literal[1] = 1
    base_model: str
    keep: float = Field(gt=0, le=1)
    modules: dict[str, ModuleSpec]
    recipe: dict[str, Any] = Field(default_factory=dict)

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
    if version != FORMAT_VERSION:
        raise UserError(
            f"{source}: format_version {version!r} is not supported (this svdserve reads "
            f"{FORMAT_VERSION}); upgrade svdserve or compress the model again"
        )
    try:
        return CheckpointConfig.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "quantization_config"
        raise UserError(f"{source}: {place}: {first['msg']}") from None
