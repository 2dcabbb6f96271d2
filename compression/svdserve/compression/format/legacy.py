"""Versions 1 and 2 of the format, which svdserve still reads but no longer writes.

They support one kind of block, with the groups of ``GROUPS``. Version 2 added int8.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from svdserve.compression.format.roles import Role

VERSIONS = (1, 2)
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Members of each stacked module; a module of another name is its own only member."""
_ROLES: dict[str, Role] = {
    "qkv_proj": "attention_in",
    "o_proj": "attention_out",
    "gate_up_proj": "mlp_in",
    "down_proj": "mlp_out",
}


class _Module(BaseModel):
    model_config = ConfigDict(extra="forbid")

    members: Annotated[tuple[str, ...], Field(min_length=1)]
    layout: Literal["pair", "interpolative"]
    rank: Any
    in_: Any = Field(alias="in")
    out: Any
    weights: Literal["float", "int8"] = "float"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")

    quant_method: str
    format_version: int
    base_model: Any
    keep: Any
    modules: dict[str, _Module]
    int8_linears: tuple[str, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)


def role_of(name: str) -> Role:
    """The role of a linear or module of version 1 or 2, from the last part of its name."""
    last = name.rpartition(".")[2]
    group = next((group for group, members in GROUPS.items() if last in (group, *members)), last)
    return _ROLES.get(group, "other")


def upgraded(block: dict[str, Any]) -> dict[str, Any]:
    """Convert a ``quantization_config`` block of version 1 or 2 to version 3.

    Raises:
        ValueError: the block is malformed (pydantic's ValidationError is a ValueError).
    """
    old = _Block.model_validate(block)
    int8 = [name for name, module in old.modules.items() if module.weights == "int8"]
    int8 += old.int8_linears
    if old.format_version == 1 and int8:
        raise ValueError(f"{int8[0]}: int8 weights need format_version 2")
    if repeated := [name for name in old.int8_linears if old.int8_linears.count(name) > 1]:
        raise ValueError(f"int8_linears: {repeated[0]} is listed twice")
    modules = {}
    for name, module in old.modules.items():
        last = name.rpartition(".")[2]
        expected = GROUPS.get(last, (last,))
        if module.members != expected:
            raise ValueError(f"{name}: members {list(module.members)}, expected {list(expected)}")
        fields = module.model_dump(by_alias=True, exclude={"weights"})
        modules[name] = {"role": role_of(name), "codec": module.weights} | fields
    linears = {name: {"role": role_of(name), "codec": "int8"} for name in old.int8_linears}
    kept = old.model_dump(include={"quant_method", "base_model", "keep", "recipe"})
    return kept | {"format_version": 3, "modules": modules, "linears": linears}
