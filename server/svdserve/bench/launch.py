"""Runs a server in a process of its own until a context ends."""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from svdserve.server.faults import EngineDied

START_SECONDS = 900
_PERIOD = 0.05
_STOP_SECONDS = 30
SERVE = (sys.executable, "-m", "svdserve.cli.main", "serve")


@dataclass(frozen=True)
class Server:
    """A server that has answered on /health.

    Attributes:
        url: without a path.
        pid: of the process that was started; engine and workers are its descendants.
        started: time.perf_counter() just before it was started.
    """

    url: str
    pid: int
    started: float

    def peak_resident_bytes(self) -> int:
        """The sum of the peak resident memories of its processes (Linux)."""
        process = psutil.Process(self.pid)
        return sum(_peak(one.pid) for one in (process, *process.children(recursive=True)))


@contextmanager
def running(
    directory: Path,
    host: str,
    port: int,
    log: Path,
    flags: Sequence[str] = (),
    *,
    command: Sequence[str] = SERVE,
) -> Iterator[Server]:
    """Serve a model until the context ends.

    Args:
        directory: the model.
        host, port: where it listens.
        log: the file for its output.
        flags: of `vllm serve`.
        command: the words of the command line before the directory.

    Raises:
        EngineDied: the server ended (the message holds the end of its log), or did not answer in
            START_SECONDS.
    """
    arguments = [*command, str(directory), "--host", host, "--port", str(port), *flags]
    url = f"http://{host}:{port}"
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _healthy(url):
            if process.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise EngineDied(f"the server ended with {process.returncode}:\n{tail}")
            if time.perf_counter() - started > START_SECONDS:
                raise EngineDied(f"the server was not ready in {START_SECONDS} s; see {log}")
            time.sleep(_PERIOD)
        yield Server(url, process.pid, started)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _peak(pid: int) -> int:
    """The peak resident memory of a process in bytes; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
