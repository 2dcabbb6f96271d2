"""`svdserve serve`: vLLM's own server, in this process, with our plug-ins switched on.

Built on the surface that vLLM 0.32 and 0.33 share: the entry point of its console script, the
endpoint plug-in (app.py) and the worker extension (worker.py). Every flag of `vllm serve` works.
"""

import argparse
import importlib.metadata
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from svdserve.compression.checkpoint import (
    TensorFiles,
    check_sizes,
    is_checkpoint,
    open_checkpoint,
    read_json,
)
from svdserve.compression.errors import UserError
from svdserve.server.cpu_install import work_around
from svdserve.server.worker import EXTENSION

ENDPOINT_GROUP = "vllm.endpoint_plugins"
PLUGIN = "svdserve"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000


def serve(directory: str, extra_args: Sequence[str] = ()) -> int:
    """Serve a model directory until SIGTERM or SIGINT; returns the exit status.

    Args:
        directory: an svdserve checkpoint, or a dense Hugging Face model, which is served as it is.
        extra_args: flags of `vllm serve`. Without --host the server listens on this machine only.

    Raises:
        UserError: no such model, a malformed checkpoint, or a port that is taken.
    """
    if not check_model(Path(directory)):
        print(f"{directory} is not compressed by svdserve: serving it dense", file=sys.stderr)
    arguments = server_arguments(extra_args)
    os.environ["VLLM_PLUGINS"] = ",".join(allowed_plugins(os.environ.get("VLLM_PLUGINS")))
    work_around()
    sys.argv = ["vllm", "serve", directory, *arguments]
    from vllm.entrypoints.cli.main import main  # Heavy, and reads the environment on import.

    main()
    return 0


def check_model(directory: Path) -> bool:
    """Refuse what cannot be served, before vLLM starts; reads headers only.

    Returns:
        Whether it is an svdserve checkpoint; if not, a dense model.

    Raises:
        UserError: see serve().
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a model directory on this machine")
    if is_checkpoint(directory):
        open_checkpoint(directory)
        return True
    config, files = read_json(directory / "config.json"), TensorFiles(directory)
    check_sizes(files, config)
    if any(name.endswith(".factor_in") for name in files.info):
        raise UserError(
            f"{directory}: has low-rank factors, but config.json does not say that they are "
            "svdserve's; copy the whole checkpoint again"
        )
    return False


def server_arguments(extra_args: Sequence[str]) -> list[str]:
    """The user's flags with our defaults for those that are absent.

    Raises:
        UserError: the port is taken or no port.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--uds")
    parser.add_argument("--worker-extension-cls", "--worker_extension_cls")
    try:
        given, _ = parser.parse_known_args(extra_args)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    arguments = list(extra_args)
    if given.uds is None:
        check_port(given.host or DEFAULT_HOST, given.port)
        if given.host is None:
            arguments += ["--host", DEFAULT_HOST]
    if given.worker_extension_cls is None:
        arguments += ["--worker-extension-cls", EXTENSION]
    return arguments


def check_port(host: str, port: int) -> None:
    """Raise a UserError unless this process could listen on ``host:port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error}); choose another --host or --port"
            ) from None


def allowed_plugins(current: str | None) -> list[str]:
    """The value of VLLM_PLUGINS that adds our endpoint plug-in and takes none away.

    vLLM loads endpoint plug-ins only when this list names them, and then treats it as an allow-list
    for every group of plug-ins. Unset means all, so all must be named; other packages' endpoint
    plug-ins stay out, as they do in vLLM.
    """
    if current is not None:
        return sorted({*current.split(","), PLUGIN} - {""})
    entry_points = importlib.metadata.entry_points()
    groups = {group for group in entry_points.groups if group.startswith("vllm.")}
    groups.discard(ENDPOINT_GROUP)
    named = {entry.name for group in groups for entry in entry_points.select(group=group)}
    return sorted(named | {PLUGIN})
