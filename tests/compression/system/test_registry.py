"""Named parts: those of svdserve, and those that installed packages add by entry points."""

from importlib.metadata import EntryPoint

import pytest

from svdserve.compression.system import registry as module
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.registry import Registry

GROUP = "svdserve.tests"


class Thing:
    """A part of the kind."""


FOUND, FIRST, SECOND, ELSE = Thing(), Thing(), Thing(), "not a part"


class Package:
    """What an installed package's entry point knows of it."""

    name = "svdserve-extra"


class Points:
    """The entry points of one group, each with the times that it was loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
        self.asked: list[str] = []
        self.points = [EntryPoint(name, value, GROUP) for name, value in targets.items()]
        for point in self.points:
            vars(point).update(dist=Package)
        monkeypatch.setattr(module, "entry_points", self._of)

    def _of(self, group: str) -> list[EntryPoint]:
        self.asked.append(group)
        return self.points


@pytest.fixture
def registry() -> Registry[Thing]:
    found: Registry[Thing] = Registry("thing", GROUP, Thing)
    found.add("second", SECOND)
    found.add("first", FIRST)
    return found


def test_what_is_added_is_found_by_name(registry: Registry[Thing]) -> None:
    assert registry["first"] is registry.get_known("first") is FIRST
    assert list(registry) == ["second", "first"]
    assert len(registry) == 2
    assert ("first" in registry, "third" in registry) == (True, False)
    assert dict(registry) == {"second": SECOND, "first": FIRST}
    assert registry.get("third") is None


def test_unknown_names_are_refused_with_those_that_there_are(registry: Registry[Thing]) -> None:
    with pytest.raises(UserError, match=r"^unknown thing 'third'; allowed: first, second$"):
        registry.get_known("third")
    with pytest.raises(KeyError, match="third"):
        registry["third"]
    with pytest.raises(UserError, match=r"unknown thing '\\x1b\[31m'"):  # escaped
        registry.get_known("\x1b[31m")


def test_two_parts_of_one_name_are_refused(registry: Registry[Thing]) -> None:
    registry.add("first", registry["first"])  # a module that is imported twice
    with pytest.raises(ValueError, match=r"two entries of svdserve.tests are called 'first'"):
        registry.add("first", Thing())
    assert registry["first"] is FIRST


def test_packages_add_parts(registry: Registry[Thing], monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points(monkeypatch, third=f"{__name__}:FOUND")
    assert registry["first"] is FIRST
    assert points.asked == []  # nothing is imported for a name of svdserve's own
    assert registry["third"] is FOUND
    assert list(registry) == ["second", "first", "third"]
    assert len(registry) == 3
    assert points.asked == [GROUP]
    with pytest.raises(UserError, match=r"allowed: first, second, third$"):
        registry.get_known("fourth")
    assert points.asked == [GROUP]


def test_a_listing_has_what_packages_add(
    registry: Registry[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    Points(monkeypatch, third=f"{__name__}:FOUND")
    assert sorted(registry) == ["first", "second", "third"]


def test_a_function_whose_decorator_adds_it_is_not_replaced(
    registry: Registry[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry point leads to the function, and the decorator has added something else."""
    Points(monkeypatch, third=f"{__name__}:FOUND")
    added = Thing()
    monkeypatch.setattr(EntryPoint, "load", lambda point: registry.add(point.name, added) or ELSE)
    assert registry["third"] is added


def test_a_package_cannot_replace_what_svdserve_has(
    registry: Registry[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    Points(monkeypatch, first=f"{__name__}:FOUND")
    assert dict(registry)["first"] is FIRST


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_at_all:x", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (f"{__name__}:no_such_thing", "AttributeError: .*no_such_thing"),
        (f"{__name__}:ELSE", "leads to a str, and its module has no thing of that name"),
    ],
)
def test_a_broken_package_is_named(
    target: str, message: str, registry: Registry[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    Points(monkeypatch, third=target)
    with pytest.raises(UserError, match=message) as caught:
        registry.get_known("third")
    assert str(caught.value).startswith("thing 'third' of the package svdserve-extra")
    assert "repair or uninstall that package" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert registry["first"] is FIRST
