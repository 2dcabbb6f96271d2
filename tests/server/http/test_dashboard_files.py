"""The files of the dashboard's page, as they are packed and where they come from."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STATIC = ROOT / "server/svdserve/server/http/dashboard/static"


def test_the_wheel_carries_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    prefix = "svdserve/server/http/dashboard/static/"
    with zipfile.ZipFile(wheel) as archive:
        packed = {n.removeprefix(prefix) for n in archive.namelist() if n.startswith(prefix)}
    files = {str(f.relative_to(STATIC)) for f in STATIC.rglob("*") if f.is_file()}
    assert packed == files >= {"index.html", "vendor/uplot.min.js", "vendor/uplot.LICENSE"}


def test_the_chart_library_is_that_of_npm() -> None:
    """npm checks the package against the lock file's hash; skipped without npm or its registry."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (Debian package npm)")
    ping = subprocess.run(["npm", "ping"], capture_output=True, check=False, timeout=120)
    if ping.returncode:
        pytest.skip("the npm registry is not reached")
    check = [sys.executable, ROOT / "server/vendor/vendor.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
