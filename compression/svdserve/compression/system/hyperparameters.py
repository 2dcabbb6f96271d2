"""Hyper-parameters of registered functions: keyword-only arguments, checked by pydantic."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from svdserve.compression.system.errors import UserError


class HyperParameters:
    """The keyword-only arguments of ``functions``, with their annotations and defaults.

    Args:
        owner: the functions' name in messages, such as ``method svd-llm``.
        functions: functions whose keyword-only arguments all have a default.
    """

    def __init__(self, owner: str, *functions: Callable[..., Any]) -> None:
        fields: dict[str, Any] = {}
        for function in functions:
            hints = get_type_hints(function, include_extras=True)
            fields |= {p.name: (hints[p.name], p.default) for p in _keywords(function)}
        self._owner = owner
        self._schema: type[BaseModel] = create_model(owner, **fields)

    def check(self, given: dict[str, Any]) -> dict[str, Any]:
        """All hyper-parameters: the given values after validation, and defaults for the others.

        Raises:
            UserError: no function has a hyper-parameter of a given name, or a value is invalid.
        """
        fields = self._schema.model_fields
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise UserError(
                f"{self._owner} has no hyper-parameter {unknown[0]!r}; it takes: "
                + (", ".join(sorted(fields)) or "none")
            )
        try:
            return self._schema.model_validate(given).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            name = first["loc"][0]
            allowed = " or ".join(e["msg"] for e in error.errors() if e["loc"][0] == name)
            raise UserError(f"{name} is {given.get(str(name))!r}: {allowed}") from None

    @staticmethod
    def of(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
        """The items of ``values`` that are keyword-only arguments of ``function``."""
        return {p.name: values[p.name] for p in _keywords(function) if p.name in values}


def _keywords(function: Callable[..., Any]) -> list[inspect.Parameter]:
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind is p.KEYWORD_ONLY]
