"""`svdserve methods` as a user types it."""

from commands import svdserve
from svdserve.compression.methods import METHODS


def test_methods_lists_names_and_papers() -> None:
    done = svdserve("methods")
    assert done.returncode == 0
    for name, entry in METHODS.items():
        assert name in done.stdout
        assert entry.paper in done.stdout
