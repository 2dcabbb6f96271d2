"""`--set PART.NAME=VALUE`: fields of the parts of a recipe on the command line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from svdserve.compression.system.errors import UserError

PARTS = {
    "method": "parameters",
    "allocator": "allocator_parameters",
    "block_refinement": "block_refinement",
    "refinement": "refinement",
}
"""The parts that `--set` names, each with the field of the recipe that holds its values."""
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def with_settings(recipe: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe, changed by ``--set``; of two settings of one value the last counts.

    Args:
        recipe: as ``load_recipe`` gives it.
        settings: PART.NAME=VALUE, where PART is one of PARTS and VALUE is YAML.

    Raises:
        UserError: a setting does not have this form, or its part of the recipe is no mapping.
    """
    fields = dict(recipe)
    for setting in settings:
        target, equals, value = setting.partition("=")
        part, _, name = target.strip().partition(".")
        if not equals or not name or part not in PARTS:
            parts = ", ".join(PARTS)
            raise UserError(
                f"--set {setting}: give PART.NAME=VALUE with one of these parts: {parts}; "
                "for example --set method.ridge=1e-4"
            )
        values = fields.get(PARTS[part])
        if not isinstance(values, dict | None):
            raise UserError(
                f"recipe: {PARTS[part]} must map names to values, as in {{{name}: {value}}}"
            )
        fields[PARTS[part]] = {**(values or {}), name: _parsed(setting, value)}
    return fields


def _parsed(setting: str, value: str) -> Any:
    if _NUMBER.fullmatch(value.strip()) and not value.strip().isdecimal():
        return float(value)  # YAML reads 1e-4 as text
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--set {setting}: the value is not YAML ({said})") from None
