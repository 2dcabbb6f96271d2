"""The picture says what it shows, and is the same file for the same figures."""

from pathlib import Path
from xml.etree import ElementTree

from svdserve.bench.plots import Point, draw


def test_the_picture_names_panels_models_and_ratios_of_work(tmp_path: Path) -> None:
    points = [
        Point("batch 1", 1.3, 1.2, 1.5, work_ratio=1.4),
        Point("batch 8", 1.1, 0.9, 1.2, None),
    ]
    panels = {"decode": {"keep-0.8": points, "keep-0.6": points[:1]}}
    for name in ("one.svg", "two.svg"):
        draw(panels, tmp_path / name, "dense", "tokens/s over dense")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    words = {(element.text or "").strip() for element in ElementTree.fromstring(drawn).iter()}
    shown = {
        "decode",
        "keep-0.8",
        "keep-0.6",
        "dense",
        "bytes or operations ratio",
        "batch 1",
        "batch 8",
    }
    assert shown | {"tokens/s over dense"} <= words
