"""Known vulnerabilities of the locked versions, without the network.

    python requirements/audit.py ADVISORIES [LOCK ...]

ADVISORIES is a clone of github.com/pypa/advisory-database, the data behind pip-audit: one file in
the OSV format (https://ossf.github.io/osv-schema) for each advisory. LOCK are files of
``name==version`` lines, those beside this file when absent. Exits with 1 if a version is affected.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCKS = [Path(__file__).with_name(name) for name in ("cpu.txt", "torch.txt")]


def locked(files: Iterable[Path]) -> dict[str, Version]:
    """Version of every package, without a local label: 2.13.0+cpu is 2.13.0."""
    lines = (line.split(";")[0].split() for file in files for line in file.read_text().splitlines())
    pins = (words[0].split("==") for words in lines if words and "==" in words[0])
    return {canonicalize_name(name): Version(Version(pin).public) for name, pin in pins}


def advisories(folder: Path) -> Iterator[dict[str, Any]]:
    """All that have not been withdrawn."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.glob("vulns/*/*.yaml")):
        advisory = yaml.load(path.read_text(encoding="utf-8"), loader)
        if not advisory.get("withdrawn"):
            yield advisory


def affects(affected: dict[str, Any], version: Version) -> bool:
    """Whether a version is listed, or lies in one of the ranges."""
    if any(_version(listed) == version for listed in affected.get("versions", ())):
        return True
    ranges = (r["events"] for r in affected.get("ranges", ()) if r["type"] == "ECOSYSTEM")
    return any(_within(events, version) for events in ranges)


def _within(events: list[dict[str, str]], version: Version) -> bool:
    """Events open and close intervals; the last one up to ``version`` counts."""
    bounds = ((_version(text), kind) for event in events for kind, text in event.items())
    inside = False
    for bound, kind in sorted((bound, kind) for bound, kind in bounds if bound is not None):
        if bound < version or (bound == version and kind != "last_affected"):
            inside = kind == "introduced"
    return inside


def _version(text: str) -> Version | None:
    try:
        return Version(str(text))
    except InvalidVersion:
        return None


def main(arguments: list[str]) -> int:
    """Print what was found as JSON, and how old the newest advisory is."""
    folder, *files = map(Path, arguments)
    pins = locked(files or LOCKS)
    count, newest, found = 0, "", []
    for advisory in advisories(folder):
        count, newest = count + 1, max(newest, str(advisory["modified"])[:10])
        for affected in advisory["affected"]:
            name = canonicalize_name(affected["package"]["name"])
            if name in pins and affects(affected, pins[name]):
                found.append(f"{name} {pins[name]}: {advisory['id']}")
    told = {"packages": len(pins), "advisories": count, "newest": newest, "affected": found}
    print(json.dumps(told, indent=2))
    if not count:
        sys.exit(f"{folder}: no advisories; give a clone of github.com/pypa/advisory-database")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
