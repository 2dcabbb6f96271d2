"""Where a method is declared: one decorated, typed, pure function per paper.

A method takes the float64 weight [m, n] of a factored module (the stacked weight of a group), the
statistics of its inputs and a rank, and returns the pair factors. It touches no model, no file and
chooses no device. Keyword-only parameters with a default are its hyper-parameters: a recipe sets
them by name, and their annotations (pydantic's) are checked when the recipe is.

A learned method has a Learner as well: its function gives all components of every module, and
which of them stay is learned over the whole model (learned/driver.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.methods.learner import Learner
from svdserve.compression.statistics.moments import STATISTICS, Statistics
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.hyperparameters import Parameters
from svdserve.compression.system.registry import Registry

Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""λ over the mean of the diagonal of the Gram matrix that it damps."""


@dataclass(frozen=True)
class Solution:
    """Float64 pair factors of a weight, and what the log should say about them (β, damping)."""

    factors: Factors
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method and what the driver must know to run it."""

    name: str
    title: str
    paper: str
    statistics: frozenset[str]
    extra_statistics: Callable[[dict[str, Any]], set[str]]
    function: Callable[..., Solution]
    schema: Parameters
    learner: type[Learner] | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters and their defaults."""
        return self.schema.check({})

    def needs(self, parameters: dict[str, Any]) -> frozenset[str]:
        """The names of the statistics that it reads with these hyper-parameters."""
        return self.statistics | self.extra_statistics(parameters)

    def make_learner(self, parameters: dict[str, Any]) -> Learner | None:
        """The rules by which scores are learned, where the method has such."""
        made = self.learner
        return None if made is None else made(**Parameters.of(made, parameters))

    def solve(
        self, weight: Tensor, statistics: Statistics, rank: int, parameters: dict[str, Any]
    ) -> Solution:
        own = Parameters.of(self.function, parameters)
        return self.function(weight.double(), statistics, rank, **own)


METHODS: Registry[Method] = Registry("method", "svdserve.methods", Method)
"""By name; an installed package adds one by the entry point ``svdserve.methods``."""


def method(
    name: str,
    *,
    title: str,
    paper: str,
    statistics: set[str],
    extra_statistics: Callable[[dict[str, Any]], set[str]] = lambda _parameters: set(),
    learner: type[Learner] | None = None,
) -> Callable[[Callable[..., Solution]], Callable[..., Solution]]:
    """Register a function as the method ``name``.

    Args:
        name: on the command line and in recipes.
        title, paper: for the README.
        statistics: the names of what it reads (statistics/moments.py).
        extra_statistics: the names of what some hyper-parameters need besides.
        learner: the rules of a learned method.

    Raises:
        UserError: there is no statistic of such a name.
    """
    if unknown := sorted(statistics - STATISTICS.keys()):
        raise UserError(
            f"method {name}: unknown statistic {unknown[0]!r}; allowed: "
            f"{', '.join(sorted(STATISTICS))}"
        )

    def register(function: Callable[..., Solution]) -> Callable[..., Solution]:
        schema = Parameters(f"method {name}", function, *([learner] if learner else []))
        needs = frozenset(statistics)
        METHODS.add(
            name, Method(name, title, paper, needs, extra_statistics, function, schema, learner)
        )
        return function

    return register


def markdown_table() -> str:
    """All methods, for the README."""
    lines = ["| `--method` | paper | calibration statistics | parameters |", "|---|---|---|---|"]
    for name, entry in sorted(METHODS.items()):
        wanted = [STATISTICS[key].description for key in sorted(entry.statistics)]
        wanted += ["the tokens themselves, to learn on"] if entry.learner else []
        needs = "; ".join(wanted) or "none"
        takes = ", ".join(f"`{key}={value}`" for key, value in entry.parameters.items()) or "none"
        lines.append(f"| `{name}` | [{entry.title}]({entry.paper}) | {needs} | {takes} |")
    return "\n".join(lines) + "\n"


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; lists those that there are.
    """
    return METHODS.get_known(name)
