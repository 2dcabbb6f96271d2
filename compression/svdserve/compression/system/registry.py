"""Named parts of svdserve that other packages may add to, through Python's entry points."""

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from svdserve.compression.system.errors import UserError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """The known parts of one kind, by name: those of svdserve, and those of installed packages.

    A package adds a part by an entry point of ``group`` whose name is the part's. The entry point
    leads to the part itself, or to a function whose decorator adds it when its module is imported.
    They are loaded when a name is looked for that svdserve itself does not have, or when all names
    are listed.

    Args:
        kind: what messages call a part, such as ``method``.
        group: of the entry points, such as ``svdserve.methods``.
        part: what a part is an instance of.
    """

    def __init__(self, kind: str, group: str, part: type[Entry]) -> None:
        self._kind, self._group, self._part = kind, group, part
        self._known: dict[str, Entry] = {}
        self._loaded = False

    def add(self, name: str, entry: Entry) -> None:
        """Make ``entry`` known as ``name``.

        Raises:
            ValueError: another part has this name.
        """
        if self._known.get(name, entry) is not entry:
            raise ValueError(f"two entries of {self._group} are called {name!r}")
        self._known[name] = entry

    def get_known(self, name: str) -> Entry:
        """The part of this name.

        Raises:
            UserError: there is none; lists those that there are.
        """
        if name not in self._known:
            self._load()
        if name not in self._known:
            known = ", ".join(sorted(self._known))
            raise UserError(f"unknown {self._kind} {name!r}; allowed: {known}")
        return self._known[name]

    def __getitem__(self, name: str) -> Entry:
        try:
            return self.get_known(name)
        except UserError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(tuple(self._known))

    def __len__(self) -> int:
        self._load()
        return len(self._known)

    def _load(self) -> None:
        """Import what installed packages add; once in a process."""
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self._group):
            try:
                found = point.load()
            except Exception as error:
                raise UserError(
                    f"{self._kind} {point.name!r} of the package {_package(point)} cannot be "
                    f"loaded ({type(error).__name__}: {error}); repair or uninstall that package"
                ) from None
            if point.name not in self._known and not isinstance(found, self._part):
                raise UserError(
                    f"{self._kind} {point.name!r} of the package {_package(point)}: the entry "
                    f"point leads to a {type(found).__name__}, and its module has no {self._kind} "
                    "of that name; repair or uninstall that package"
                )
            if point.name not in self._known:
                self.add(point.name, found)


def _package(point: object) -> str:
    distribution = getattr(point, "dist", None)
    return str(distribution.name) if distribution is not None else "unknown"
