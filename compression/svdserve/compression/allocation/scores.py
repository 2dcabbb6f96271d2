"""Ranks r by the learned scores of components."""

from collections.abc import Mapping

import torch

from svdserve.compression.allocation.registry import ROUNDING, Budget, Module, Ranks, allocator


@allocator("scores", needs_spectra=False)
def scores(modules: Mapping[str, Module], budget: Budget) -> Ranks:
    """Take the components of the whole model by falling score until κ is spent.

    A step that does not fit is skipped, so that less than one rank of any module is left over.
    """
    if budget.keep >= 1:
        return dict.fromkeys(modules)
    ranks = {name: budget.ranks(module) for name, module in modules.items()}
    room = budget.keep * sum(module.dense for module in modules.values()) + ROUNDING
    room -= sum(budget.cost(module, ranks[name][0]) for name, module in modules.items())
    steps: list[tuple[float, str, int]] = []
    for name, module in modules.items():
        assert module.scores is not None, "the method must have learned them"
        falling = module.scores.double().sort(descending=True).values
        ends = [len(falling) if rank is None else rank for rank in ranks[name]]
        totals = falling.cumsum(0)[torch.tensor(ends) - 1]
        # Rounding must not sort a step of equal scores before the step that it follows.
        means = (totals.diff() / torch.tensor(ends).diff()).cummin(0).values
        steps += [(-mean, name, i) for i, mean in enumerate(means.tolist())]
    taken = dict.fromkeys(modules, 0)
    for _, name, step in sorted(steps):
        extra = budget.cost(modules[name], ranks[name][step + 1])
        extra -= budget.cost(modules[name], ranks[name][step])
        if step == taken[name] and extra <= room:
            taken[name] += 1
            room -= extra
    return {name: ranks[name][step] for name, step in taken.items()}
