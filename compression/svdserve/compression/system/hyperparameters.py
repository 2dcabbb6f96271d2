"""Hyper-parameters of registered functions: keyword-only arguments, checked by pydantic."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from svdserve.compression.system.errors import UserError


class Parameters:
    """The keyword-only arguments of ``functions``, with their annotations and defaults.

    Args:
        owner: what the messages call it, such as ``method svd-llm``.
        functions: all their keyword-only arguments have a default.
    """

    def __init__(self, owner: str, *functions: Callable[..., Any]) -> None:
        fields: dict[str, Any] = {}
        for function in functions:
            hints = get_type_hints(function, include_extras=True)
            fields |= {p.name: (hints[p.name], p.default) for p in _keywords(function)}
        self._owner = owner
        self._schema: type[BaseModel] = create_model(owner, **fields)

    def check(self, given: dict[str, Any]) -> dict[str, Any]:
        """The full set: what is given, checked, and the defaults of the rest.

        Raises:
            UserError: a name that the function does not take, or a value that is out of range.
        """
        fields = self._schema.model_fields
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise UserError(
                f"{self._owner} has no parameter {unknown[0]!r}; it takes: "
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
        """Those of ``values`` that ``function`` takes."""
        return {p.name: values[p.name] for p in _keywords(function) if p.name in values}


def _keywords(function: Callable[..., Any]) -> list[inspect.Parameter]:
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind is p.KEYWORD_ONLY]
