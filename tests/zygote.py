"""Many runs of `svdserve` for the price of one import: a process that has everything and forks.

A run is a process of its own with its own signals and exit code. It may end itself by SIGKILL just
before the n-th change of the file system, which a clock hits too seldom.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copytree")
# One thread: a forked process has none of OpenMP's, and sums are the same every time.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "160",
}


@dataclass
class Started:
    """A run that goes on: its process, and where its standard error goes."""

    pid: int
    errors: Path
    zygote: "subprocess.Popen[str]"

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> "Ended":
        """Blocks until it has ended; ``kill`` must not follow."""
        assert self.zygote.stdout
        status, changes = json.loads(self.zygote.stdout.readline())
        return Ended(os.waitstatus_to_exitcode(status), self.errors.read_text(), changes)


@dataclass(frozen=True)
class Ended:
    """Exit code (or minus the signal), standard error, and changes of the file system.

    A change is one letter: r for a rename, d for anything else.
    """

    code: int
    errors: str
    changes: str


class Zygote:
    """Starts runs one after the other."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def start(
        self, arguments: Sequence[object], *, kill_at: int = 0, file_limit: int | None = None
    ) -> Started:
        """Begin a run of `svdserve` with these arguments.

        Args:
            kill_at: SIGKILL before the change of this number, counted from 1; 0 for never.
            file_limit: bytes that no file may exceed.
        """
        assert self._process.stdin
        assert self._process.stdout
        errors = self._folder / "errors"
        request = [list(map(str, arguments)), str(errors), kill_at, file_limit]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Started(int(self._process.stdout.readline()), errors, self._process)

    def run(self, arguments: Sequence[object], **options: Any) -> Ended:
        """A whole run."""
        return self.start(arguments, **options).wait()


@contextmanager
def zygote(folder: Path) -> Iterator[Zygote]:
    """A zygote that keeps its files in ``folder``."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT,
    )
    try:
        yield Zygote(process, folder)
    finally:
        process.communicate()


def _serve() -> None:
    for module in ("job", "refine"):  # which the commands import when they run
        import_module(f"svdserve.compression.pipeline.{module}")
    from svdserve.cli.main import main

    for line in sys.stdin:
        arguments, errors, kill_at, file_limit = json.loads(line)
        report, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(report)
            _become(arguments, errors, kill_at, file_limit, answer, main)
        os.close(answer)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(report) as stream:
            changes = stream.read()
        print(json.dumps([status, changes]), flush=True)


def _become(
    arguments: list[str],
    errors: str,
    kill_at: int,
    file_limit: int | None,
    answer: int,
    main: Any,
) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["svdserve", *arguments]
    count = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal count
        if event in _CHANGES:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(answer, b"r" if event == "os.rename" else b"d")

    sys.addaudithook(hook)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
