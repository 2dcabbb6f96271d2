"""Plots with matplotlib, which is an optional dependency that only this module imports."""

from pathlib import Path
from typing import TYPE_CHECKING

from svdserve.compression.system.errors import UserError
from svdserve.compression.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install 'svdserve[eval]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_figure(file: Path | None) -> None:
    """Check before a long job that ``save_figure`` can write ``file``; None means no figure.

    Raises:
        UserError: matplotlib is not installed, or the name ends in neither .svg nor .png.
    """
    if file is None:
        return
    if file.suffix not in (".svg", ".png"):
        raise UserError(f"{file}: unknown kind of picture; give a name that ends in .svg or .png")
    new_figure(1, 1)


def save_figure(figure: "Figure", file: Path) -> None:
    """Write a figure as SVG or PNG, by the file's suffix; equal figures give equal SVG files."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file.suffix == ".svg" else {}
    with (
        rc_context({"svg.hashsalt": "svdserve", "svg.fonttype": "none"}),
        replacing(file) as temporary,
    ):
        figure.savefig(temporary, format=file.suffix[1:], metadata=metadata)
