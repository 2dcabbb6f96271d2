"""Figures of speeds relative to the dense model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdserve.compression.evaluation.plots import new_figure, save_figure


@dataclass(frozen=True)
class Point:
    """A ratio of speeds with its range.

    Attributes:
        label: on the horizontal axis.
        median, lowest, highest: over the rounds.
        work_ratio: the bytes ratio or the operations ratio (ratios.py); None if not known.
    """

    label: str
    median: float
    lowest: float
    highest: float
    work_ratio: float | None


def draw(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], file: Path, dense: str, ylabel: str
) -> None:
    """Draw a panel for each title, with a line for each model and crosses for its work ratios.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = new_figure(max(6.0, 3.6 * len(panels)), 3.6)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, models) in zip(every, panels.items(), strict=True):
        for number, (model, points) in enumerate(models.items()):
            medians = [point.median for point in points]
            spread = [
                [point.median - point.lowest for point in points],
                [point.highest - point.median for point in points],
            ]
            aside = 0.06 * (number - (len(models) - 1) / 2)  # so that no range hides another
            colour, places = f"C{number}", [place + aside for place in range(len(points))]
            axes.errorbar(
                places, medians, yerr=spread, color=colour, marker="o", capsize=3, label=model
            )
            ratios = zip(places, (point.work_ratio for point in points), strict=True)
            known = [(place, ratio) for place, ratio in ratios if ratio]
            if known:
                label = "bytes or operations ratio" if number == 0 else None
                axes.scatter(*zip(*known, strict=True), color=colour, marker="x", label=label)
        labels = [point.label for point in max(models.values(), key=len)]
        axes.set_xticks(range(len(labels)), labels)
        axes.axhline(1, color="grey", linestyle="--", label=dense)
        axes.set(title=title)
    every[0].set_ylabel(ylabel)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, file)
