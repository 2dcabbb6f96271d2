"""Ranks r that minimise the total of the spectra's tails Σ_{i>r} under one budget of parameters.

The allocators ``energy``, ``sensitivity`` and ``divergence`` differ only in the spectrum.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from svdserve.compression.allocation.registry import ROUNDING, Budget, Module, Ranks

Share = Annotated[float, Field(ge=0, le=1)]


class _Choice:
    """The ranks that one module may get, their costs and their tails, by rising cost."""

    def __init__(self, module: Module, spectrum: Tensor, budget: Budget, floor: float) -> None:
        least = budget.rank(module, floor * budget.keep)
        options = budget.ranks(module)
        self.ranks = options[options.index(least) :]
        self.costs = torch.tensor([budget.cost(module, r) for r in self.ranks]).double()
        tails = spectrum.double().flip(0).cumsum(0).flip(0)  # tails[r] = Σ_{i>r}
        left = [0.0 if r is None or r >= len(tails) else float(tails[r]) for r in self.ranks]
        self.tails = torch.tensor(left, dtype=torch.float64)
        self.chosen = 0

    def at_price(self, price: float) -> int:
        """Index of the least tail + price · cost; the cheaper rank if two are equal."""
        return int((self.tails + price * self.costs).argmin())

    def cost(self) -> float:
        return float(self.costs[self.chosen])

    def gain(self, room: float) -> tuple[float, int]:
        """The best saving of tail per parameter among ranks that cost at most ``room`` more.

        Returns the saving and the index of the rank.
        """
        extra = self.costs[self.chosen + 1 :] - self.costs[self.chosen]
        extra = extra[extra <= room]
        if not len(extra):
            return 0.0, self.chosen
        saved = self.tails[self.chosen] - self.tails[self.chosen + 1 :][: len(extra)]
        best = int((saved / extra).argmax())
        return float(saved[best] / extra[best]), self.chosen + 1 + best


def least_tail(
    modules: Mapping[str, Module], spectra: Mapping[str, Tensor], budget: Budget, floor: float
) -> Ranks:
    """Ranks of least total tail that store at most κ, and less than one more rank below κ.

    A price per parameter, found by bisection, makes the modules' choices independent (Lagrangian
    relaxation). The rest of the budget goes to the steps that save most per parameter.

    Args:
        spectra: the spectrum of each module, descending, by the module's name.
        floor: least keep ratio of each module as a share of κ.
    """
    total = budget.keep * sum(module.dense for module in modules.values()) + ROUNDING
    choices = {n: _Choice(m, spectra[n], budget, floor) for n, m in modules.items()}
    if floor and sum(float(choice.costs[0]) for choice in choices.values()) > total:
        # Rounded up to whole ranks, the floors exceed the budget; only the budget is binding.
        return least_tail(modules, spectra, budget, 0.0)

    def spent(price: float) -> float:
        for choice in choices.values():
            choice.chosen = choice.at_price(price)
        return sum(choice.cost() for choice in choices.values())

    low, high = 0.0, 1.0
    while spent(high) > total and high < 1e300:
        high *= 1e3
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 1e3
        low, high = (low, middle) if spent(middle) <= total else (middle, high)
    room = total - spent(high)
    while room > 0:
        best = max(choices.values(), key=lambda choice: choice.gain(room)[0])
        gain, step = best.gain(room)
        if gain <= 0:
            break
        room += best.cost()
        best.chosen = step
        room -= best.cost()
    return {name: choice.ranks[choice.chosen] for name, choice in choices.items()}
