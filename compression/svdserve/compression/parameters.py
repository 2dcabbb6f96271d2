"""Hyper-parameters of a registered function: its keyword-only arguments, checked by pydantic."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from svdserve.compression.errors import UserError


class Parameters:
    """The keyword-only arguments of ``function``, with their annotations and defaults.

    Args:
        owner: what the messages call it, such as ``method svd-llm``.
        function: all its keyword-only arguments have a default.
    """

    def __init__(self, owner: str, function: Callable[..., Any]) -> None:
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {
            p.name: (hints[p.name], p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
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
