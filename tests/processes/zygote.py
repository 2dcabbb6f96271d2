"""Many runs of `svdserve` for the price of one import: a process that has everything and forks.

A run is a process of its own with its own signals and exit code. ``zygote`` starts runs that may
end themselves by SIGKILL just before the n-th change of the file system, which a clock hits too
seldom. ``listening`` gives a program that stands for `svdserve` in any command line: FORKED asks
the listener for a run with its own arguments, folder, environment and streams, passes signals on,
and ends as the run does.
"""

import gc
import json
import os
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copytree")
_MODULES = (
    "svdserve.bench.engine",
    "svdserve.bench.kernels",
    "svdserve.bench.served",
    "svdserve.compression.evaluation.evaluate",
    "svdserve.compression.pipeline.job",
    "svdserve.compression.pipeline.stages.refine",
    "transformers.models.llama.modeling_llama",
)
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


FORKED = Path(__file__).with_name("forked.py")


@contextmanager
def listening(folder: Path) -> Iterator[Path]:
    """A program ``svdserve`` in ``folder``, which runs in forks of one process until the end.

    But for `svdserve serve`: vLLM wants a fresh interpreter.
    """
    address = folder / "socket"
    process = subprocess.Popen(
        [sys.executable, __file__, str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        program = folder / "svdserve"
        words = (sys.executable, "-I", "-S", str(FORKED), str(address))
        fresh = (sys.executable, "-m", "svdserve.cli.main")
        program.write_text(
            f'#!/bin/sh\n[ "$1" = serve ] && exec {shlex.join(fresh)} "$@"\n'
            f'exec {shlex.join(words)} "$@"\n'
        )
        program.chmod(0o755)
        yield program
    finally:
        process.communicate()  # it ends with its standard input


def _load() -> Any:
    """What the commands import when they run; returns their entry point."""
    for module in _MODULES:
        import_module(module)
    from svdserve.cli.main import main

    gc.collect()
    gc.freeze()  # or a collection in a run would copy all of it
    return main


def _listen(address: str, main: Any) -> NoReturn:
    """Fork a run for everyone who connects, until standard input ends."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend to a run
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # what has been frozen would be called leaked
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            _attend(connection, main)
        connection.close()


def _attend(connection: socket.socket, main: Any) -> NoReturn:
    """Run, pass signals on, and tell the status."""
    raw, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while not raw.endswith(b"\n"):
        raw += connection.recv(1 << 20)
    arguments, folder, environment = json.loads(raw)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), _errors(2)  # noqa: SIM115
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["svdserve", *arguments]
        _run(main)
    for stream in streams:
        os.close(stream)
    threading.Thread(target=_relay, args=(connection, pid), daemon=True).start()
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}".encode())
    os._exit(0)


def _errors(number: int) -> TextIO:
    """A stream like the interpreter's own for standard error."""
    return open(number, "w", buffering=1, errors="backslashreplace")


def _relay(connection: socket.socket, pid: int) -> None:
    """Signals are single bytes; whoever asked for the run ends it by going away."""
    while number := connection.recv(1):
        os.kill(pid, number[0])
    os.kill(pid, signal.SIGKILL)


def _serve(main: Any) -> None:
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
) -> NoReturn:
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
    _run(main)


def _run(main: Any) -> NoReturn:
    """As an interpreter runs its script, but for taking the interpreter apart at the end."""
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _listen(sys.argv[1], _load())
    else:
        _serve(_load())
