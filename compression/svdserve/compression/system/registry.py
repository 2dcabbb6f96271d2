"""Registries of methods, layouts and so on, which other packages extend through entry points."""

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from svdserve.compression.system.errors import UserError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """All entries of one kind by name, from svdserve and from installed packages.

    A package adds an entry by an entry point of ``group`` with the entry's name. The entry point
    refers to the entry itself, or to a function whose decorator adds the entry when its module is
    imported. Entry points are loaded when a name is requested that svdserve itself does not have,
    or when all names are listed.

    Args:
        kind: the word for an entry in messages, such as ``method``.
        group: the group of the entry points, such as ``svdserve.methods``.
        part: the class of the entries.
    """

    def __init__(self, kind: str, group: str, part: type[Entry]) -> None:
        self._kind, self._group, self._part = kind, group, part
        self._known: dict[str, Entry] = {}
        self._broken: dict[str, str] = {}
        self._loaded = False

    def add(self, name: str, entry: Entry) -> None:
        """Make ``entry`` known as ``name``.

        Raises:
            ValueError: another entry has this name.
        """
        if self._known.get(name, entry) is not entry:
            raise ValueError(f"two entries of {self._group} are called {name!r}")
        self._known[name] = entry

    def get_known(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            UserError: no entry has this name; the message lists all names. Or the entry of an
                installed package cannot be loaded; the message says why.
        """
        if name not in self._known:
            self._load()
        if name in self._broken:
            raise UserError(self._broken[name])
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
        """Import the entries that installed packages add, once in a process.

        A broken package is told when its entry is asked for; it stops nothing else.
        """
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self._group):
            where = f"{self._kind} {point.name!r} of the package {_package(point)}"
            remedy = "repair or uninstall that package"
            try:
                found = point.load()
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                self._broken[point.name] = (
                    f"{where} cannot be loaded ({type(error).__name__}: {first}); {remedy}"
                )
                continue
            if point.name in self._known:
                continue  # a decorator in its module has added it
            if isinstance(found, self._part):
                self.add(point.name, found)
            else:
                self._broken[point.name] = (
                    f"{where}: the entry point leads to a {type(found).__name__}, and its module "
                    f"has no {self._kind} of that name; {remedy}"
                )


def _package(point: object) -> str:
    distribution = getattr(point, "dist", None)
    return str(distribution.name) if distribution is not None else "unknown"
