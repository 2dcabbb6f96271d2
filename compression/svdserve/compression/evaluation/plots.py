"""The one place that knows matplotlib, which only those who plot need."""

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
    """Find out before a long job whether ``save_figure`` can work; None where none is wanted.

    Raises:
        UserError: matplotlib is not installed, or the name of the file ends otherwise.
    """
    if file is None:
        return
    if file.suffix not in (".svg", ".png"):
        raise UserError(f"{file}: unknown kind of picture; give a name that ends in .svg or .png")
    new_figure(1, 1)


def save_figure(figure: "Figure", file: Path) -> None:
    """As .svg or .png, by the name of the file; an SVG has text as text, and no date or chance."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file.suffix == ".svg" else {}
    with (
        rc_context({"svg.hashsalt": "svdserve", "svg.fonttype": "none"}),
        replacing(file) as temporary,
    ):
        figure.savefig(temporary, format=file.suffix[1:], metadata=metadata)
