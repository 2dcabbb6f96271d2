"""Which fields of a pydantic model can be command-line options, and what values they allow."""

from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_PLAIN: tuple[type, ...] = (bool, int, float, str, Path)
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Kind:
    """The values of a field: their type, whether there are several, and what is allowed."""

    value: type
    several: bool = False
    allowed: str = ""


def kind_of(field: FieldInfo) -> Kind | None:
    """The kind of a field that holds a plain value or a tuple of these; None for any other."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, metadata: list[Any]) -> Kind | None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _kind(inner, [*metadata, *(bound for one in more for bound in _bounds_in(one))])
    if origin is Literal:
        return Kind(str, allowed=", ".join(f"`{choice}`" for choice in arguments))
    if origin in (Union, UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        return _kind(others[0], metadata) if len(others) == 1 else None
    if origin is tuple and arguments[1:] == (...,):
        one = _kind(arguments[0], metadata)
        return one and Kind(one.value, several=True, allowed=one.allowed)
    return Kind(annotation, allowed=_range(metadata)) if annotation in _PLAIN else None


def _bounds_in(annotation: Any) -> list[Any]:
    return annotation.metadata if isinstance(annotation, FieldInfo) else [annotation]


def _range(metadata: list[Any]) -> str:
    """The bounds in words; empty if the only bound is that a number is above 0."""
    bounds = {n: getattr(m, n) for n in _BOUNDS for m in metadata if hasattr(m, n)}
    if bounds == {"gt": 0}:
        return ""
    return " and ".join(f"{_BOUNDS[name]} {bound}" for name, bound in bounds.items())
