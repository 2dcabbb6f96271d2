"""Copy the dashboard's chart library from its npm package, or compare with --check.

The copies are committed, so that neither the wheel nor an installation needs node. npm verifies
the package against the integrity hash in package-lock.json. To update: change the version in
package.json, `npm install --package-lock-only`, run this.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parent / "svdserve/server/http/dashboard/static/vendor"
FILES = {
    "uplot/dist/uPlot.iife.min.js": "uplot.min.js",
    "uplot/dist/uPlot.min.css": "uplot.min.css",
    "uplot/LICENSE": "uplot.LICENSE",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a file differs"
    )
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit"], cwd=folder, check=True)
        package = Path(folder, "node_modules")
        if check:
            differing = [
                copy
                for source, copy in FILES.items()
                if (TARGET / copy).read_bytes() != (package / source).read_bytes()
            ]
            for copy in differing:
                print(f"{TARGET / copy} differs from the npm package; run {sys.argv[0]}")
            return int(bool(differing))
        TARGET.mkdir(exist_ok=True)
        for source, copy in FILES.items():
            shutil.copyfile(package / source, TARGET / copy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
