"""requirements/audit.py on small advisories."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LOCK = r"""# a comment
some-package==2.1.0 \
    --hash=sha256:00
other==1.0+cpu ; python_version > '3'
"""


def audit(folder: Path, advisory: dict[str, Any]) -> tuple[int, list[str]]:
    place = folder / "vulns" / "some"
    place.mkdir(parents=True, exist_ok=True)
    (place / "PYSEC-1.yaml").write_text(json.dumps(advisory))  # JSON is YAML
    (folder / "lock.txt").write_text(LOCK)
    command = [sys.executable, ROOT / "requirements" / "audit.py", folder, folder / "lock.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert (told["packages"], told["newest"]) == (2, "2026-01-02")
    return done.returncode, told["affected"]


def advisory(package: str = "Some_Package", **affected: Any) -> dict[str, Any]:
    one = {"package": {"name": package, "ecosystem": "PyPI"}, **affected}
    return {"id": "PYSEC-1", "modified": "2026-01-02T00:00:00Z", "affected": [one]}


def events(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"type": "ECOSYSTEM", "events": [{kind: version} for kind, version in pairs]}]


@pytest.mark.parametrize(
    "ranges",
    [
        events(("introduced", "0")),
        events(("introduced", "2.1"), ("fixed", "2.1.1")),
        events(("introduced", "0"), ("last_affected", "2.1.0")),
        events(("fixed", "1.5"), ("introduced", "2.0"), ("introduced", "0")),  # in no order
        events(("introduced", "0"), ("fixed", "1.0"), ("introduced", "2.0rc1"), ("fixed", "3.0")),
    ],
)
def test_versions_in_a_range_are_found(tmp_path: Path, ranges: list[dict[str, Any]]) -> None:
    assert audit(tmp_path, advisory(ranges=ranges)) == (1, ["some-package 2.1.0: PYSEC-1"])


@pytest.mark.parametrize(
    "ranges",
    [
        events(("introduced", "0"), ("fixed", "2.1.0")),
        events(("introduced", "0"), ("last_affected", "2.0.9")),
        events(("introduced", "2.2")),
        [{"type": "GIT", "events": [{"introduced": "0"}]}],
    ],
)
def test_other_versions_are_not(tmp_path: Path, ranges: list[dict[str, Any]]) -> None:
    assert audit(tmp_path, advisory(ranges=ranges)) == (0, [])


def test_listed_versions_are_found_and_local_labels_do_not_hide_them(tmp_path: Path) -> None:
    found = ["other 1.0: PYSEC-1"]
    assert audit(tmp_path, advisory("other", versions=["0.9", "1.0", "of no version"])) == (
        1,
        found,
    )


def test_what_was_withdrawn_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "vulns" / "x").mkdir(parents=True)
    other = json.dumps(advisory("elsewhere", versions=["1"]))
    (tmp_path / "vulns" / "x" / "PYSEC-2.yaml").write_text(other)
    withdrawn = advisory(versions=["2.1.0"]) | {"withdrawn": "2026-01-03T00:00:00Z"}
    assert audit(tmp_path, withdrawn) == (0, [])


def test_a_folder_without_advisories_is_no_pass(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "requirements" / "audit.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no advisories" in done.stderr
