"""Where a method is declared: one decorated, typed, pure function per paper.

A method takes the float64 weight [m, n] of a factored module (the stacked weight of a group), the
statistics of its inputs and a rank, and returns the pair factors. It touches no model, no file and
chooses no device. Keyword-only parameters with a default are its hyper-parameters; a recipe sets
them by name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from svdserve.compression.errors import UserError
from svdserve.compression.factors import Factors
from svdserve.compression.statistics import Statistic, Statistics


@dataclass(frozen=True)
class Solution:
    """Float64 pair factors of a weight, and what the log should say about them (β, damping)."""

    factors: Factors
    facts: dict[str, float] = field(default_factory=dict)


class MethodFunction(Protocol):
    def __call__(
        self, weight: Tensor, statistics: Statistics, rank: int, /, **parameters: Any
    ) -> Solution: ...


@dataclass(frozen=True)
class Method:
    """A registered method and what the driver must know to run it."""

    name: str
    title: str
    paper: str
    statistics: frozenset[Statistic]
    function: Callable[..., Solution]
    parameters: dict[str, Any]

    def solve(
        self, weight: Tensor, statistics: Statistics, rank: int, parameters: dict[str, Any]
    ) -> Solution:
        return self.function(weight.double(), statistics, rank, **parameters)

    def check_parameters(self, given: dict[str, Any]) -> dict[str, Any]:
        """The full set of hyper-parameters; UserError on a name that the method does not take."""
        unknown = sorted(set(given) - set(self.parameters))
        if unknown:
            raise UserError(
                f"method {self.name} has no parameter {unknown[0]!r}; it takes: "
                + (", ".join(sorted(self.parameters)) or "none")
            )
        return {**self.parameters, **given}


METHODS: dict[str, Method] = {}


def method(
    name: str, *, title: str, paper: str, statistics: set[Statistic]
) -> Callable[[Callable[..., Solution]], Callable[..., Solution]]:
    """Register a function as the method ``name``."""

    def register(function: Callable[..., Solution]) -> Callable[..., Solution]:
        parameters = {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        METHODS[name] = Method(name, title, paper, frozenset(statistics), function, parameters)
        return function

    return register


def get_method(name: str) -> Method:
    """Look a method up; UserError lists the known ones."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; allowed: {', '.join(sorted(METHODS))}")
    return METHODS[name]
