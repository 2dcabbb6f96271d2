"""Serve a model under load and take a screenshot of the dashboard.

``python benchmarks/dashboard_screenshot.py MODEL OUT.png`` made docs/images/dashboard.png; it needs
Debian's Chromium and the extra ``dev``. All other flags are passed to ``vllm serve``.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / part) for part in ("support", "processes")]

from browser import VIEWS, chromium  # noqa: E402
from ports import free_port  # noqa: E402
from svdserve.bench.launch import running  # noqa: E402
from traffic import load  # noqa: E402

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--view", choices=VIEWS, default="light")
    parser.add_argument("--seconds", type=int, default=300, help="of load before the picture")
    parser.add_argument("--clients", type=int, default=6)
    arguments, serve_flags = parser.parse_known_args()
    name = arguments.model.resolve().name
    flags = ["--served-model-name", name, *serve_flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        chromium() as browser,
        running(arguments.model, HOST, free_port(), Path(folder, "log"), flags) as server,
    ):
        page = browser.new_context(**VIEWS[arguments.view]).new_page()
        page.goto(f"{server.url}/dashboard")
        with load(server.url, name, arguments.clients):
            page.wait_for_timeout(1000 * arguments.seconds)
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.quantize(128).save(arguments.out, optimize=True)  # saves two thirds of the bytes


if __name__ == "__main__":
    main()
