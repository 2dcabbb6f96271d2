"""The registry of methods: a method is one decorated, typed, pure function.

A method takes the float64 weight [m, n] of a module, the statistics of the module and a rank r, and
returns the factors. It accesses no model and no file and chooses no device. Its keyword-only
arguments are its hyper-parameters: a recipe sets them by name, and pydantic checks them by their
annotations when it checks the recipe.

A learned method also has a Learner. Its function then returns all components of a module, and the
choice of components is learned over the whole model (pipeline/stages/learning.py).
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
from svdserve.compression.system.hyperparameters import HyperParameters
from svdserve.compression.system.registry import Registry

Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Damping λ divided by the mean diagonal of the damped Gram matrix."""


@dataclass(frozen=True)
class Solution:
    """Float64 factors of a weight, and facts about them for the log (β, damping)."""

    factors: Factors
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method; ``method`` documents the fields."""

    name: str
    title: str
    paper: str
    statistics: frozenset[str]
    extra_statistics: Callable[[dict[str, Any]], set[str]]
    function: Callable[..., Solution]
    schema: HyperParameters
    learner: type[Learner] | None = None

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The hyper-parameters and their defaults."""
        return self.schema.check({})

    def needs(self, hyper_parameters: dict[str, Any]) -> frozenset[str]:
        """The names of the statistics that the method reads with these hyper-parameters."""
        return self.statistics | self.extra_statistics(hyper_parameters)

    def make_learner(self, hyper_parameters: dict[str, Any]) -> Learner | None:
        """The Learner of a learned method, else None."""
        made = self.learner
        return None if made is None else made(**HyperParameters.of(made, hyper_parameters))

    def solve(
        self, weight: Tensor, statistics: Statistics, rank: int, hyper_parameters: dict[str, Any]
    ) -> Solution:
        own = HyperParameters.of(self.function, hyper_parameters)
        return self.function(weight.double(), statistics, rank, **own)


METHODS: Registry[Method] = Registry("method", "svdserve.methods", Method)
"""All methods by name; a package adds one by an entry point of the group ``svdserve.methods``."""


def method(
    name: str,
    *,
    title: str,
    paper: str,
    statistics: set[str],
    extra_statistics: Callable[[dict[str, Any]], set[str]] = lambda _given: set(),
    learner: type[Learner] | None = None,
) -> Callable[[Callable[..., Solution]], Callable[..., Solution]]:
    """Register a function as the method ``name``.

    Args:
        name: the name on the command line and in recipes.
        title, paper: name and address of the paper, for the README.
        statistics: the names of the statistics that the method reads (statistics/moments.py).
        extra_statistics: gives the names of further statistics from the hyper-parameters.
        learner: the Learner of a learned method.

    Raises:
        UserError: no statistic has one of the names.
    """
    if unknown := sorted(statistics - STATISTICS.keys()):
        raise UserError(
            f"method {name}: unknown statistic {unknown[0]!r}; allowed: "
            f"{', '.join(sorted(STATISTICS))}"
        )

    def register(function: Callable[..., Solution]) -> Callable[..., Solution]:
        schema = HyperParameters(f"method {name}", function, *([learner] if learner else []))
        needs = frozenset(statistics)
        METHODS.add(
            name, Method(name, title, paper, needs, extra_statistics, function, schema, learner)
        )
        return function

    return register


def markdown_table() -> str:
    """The table of all methods for the README, as Markdown."""
    lines = ["| `--method` | paper | calibration statistics | parameters |", "|---|---|---|---|"]
    for name, entry in sorted(METHODS.items()):
        wanted = [STATISTICS[key].description for key in sorted(entry.statistics)]
        wanted += ["the tokens themselves, to learn on"] if entry.learner else []
        needs = "; ".join(wanted) or "none"
        takes = (
            ", ".join(f"`{key}={value}`" for key, value in entry.hyper_parameters.items()) or "none"
        )
        lines.append(f"| `{name}` | [{entry.title}]({entry.paper}) | {needs} | {takes} |")
    return "\n".join(lines) + "\n"


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: no method has this name; the message lists all names.
    """
    return METHODS.get_known(name)
