"""The one place that knows matplotlib, which only those who plot need."""

from pathlib import Path
from typing import TYPE_CHECKING

from svdserve.compression.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches; its SVG holds text, and the same for the same data.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install 'svdserve[eval]'") from None
    matplotlib.rcParams |= {"svg.hashsalt": "svdserve", "svg.fonttype": "none"}
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", file: Path) -> None:
    """As .svg or .png, by the name of the file."""
    metadata = {"Date": None} if file.suffix == ".svg" else {}
    figure.savefig(file, metadata=metadata)
