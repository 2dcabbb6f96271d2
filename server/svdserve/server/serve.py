"""`svdserve serve`: vLLM's own server, in this process, with our plug-ins switched on.

It uses only interfaces that vLLM 0.32 and 0.33 share: the entry point of vLLM's console script, the
endpoint plug-in (app.py) and the worker extension (worker.py). Every flag of `vllm serve` works.
"""

import argparse
import importlib.metadata
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from svdserve.compression.format.reader import is_checkpoint, open_checkpoint
from svdserve.compression.format.tensors import TensorFiles, check_sizes
from svdserve.compression.format.untrusted import read_json
from svdserve.compression.model.hub import model_name, resolve_model
from svdserve.compression.system.errors import UserError
from svdserve.server.capacity import add_memory_flags, check_memory
from svdserve.server.cpu_install import serves_on_cpu, work_around
from svdserve.server.http import security, shutdown
from svdserve.server.http.keys import ApiKeys, digest_of
from svdserve.server.http.security import SecurityOptions
from svdserve.server.redaction import SHORT_PATHS, shorten_paths
from svdserve.server.vllm_flags import require_vllm
from svdserve.server.worker import EXTENSION, LOAD_FORMAT

ENDPOINT_GROUP = "vllm.endpoint_plugins"
PLUGIN = "svdserve"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_GRACE_SECONDS = 30
MAX_N = 128  # answers to one prompt: OpenAI's limit; vLLM's is 16,384


def serve(
    directory: str,
    extra_args: Sequence[str] = (),
    options: SecurityOptions | None = None,
) -> int:
    """Serve a model directory until SIGTERM or SIGINT.

    Args:
        directory: an svdserve checkpoint, or a dense Hugging Face model, which is served dense; on
            a CPU with svdserve's kernels, unless the flags name another ``--load-format``.
        extra_args: flags of `vllm serve`. Without --host the server listens on this machine only.
        options: keys and limits; None reads them from the environment. Keys given in vLLM's way
            (--api-key, VLLM_API_KEY) are added to them.

    Returns:
        The exit status: 0, or 1 after the engine process has died.

    Raises:
        UserError: the model does not exist, the checkpoint is malformed, the file of keys holds no
            key, the port is taken, the memory does not suffice, the engine did not start, or a
            layer that was to be verified is wrong.
    """
    given, directory = directory, str(resolve_model(directory))
    refuse_compressed_draft([*configured_flags(extra_args), *extra_args])
    if not check_model(Path(directory)):
        print(f"{given} is not compressed by svdserve: serving it dense", file=sys.stderr)
    options, extra_args = take_keys(options or SecurityOptions.from_environment(), extra_args)
    keys = ApiKeys(options.api_keys, options.api_keys_file)
    arguments = server_arguments(directory, extra_args, guarded=keys.required)
    os.environ["VLLM_PLUGINS"] = ",".join(allowed_plugins(os.environ.get("VLLM_PLUGINS")))
    os.environ.update(options.to_environment())
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(MAX_N))
    os.environ[SHORT_PATHS] = "1"
    work_around()
    sys.argv = ["vllm", "serve", directory, *arguments]
    require_vllm()
    from svdserve.server.plugin.command import run  # heavy, and reads the environment on import

    shorten_paths()
    try:
        run()
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise UserError(
            "the engine did not start; the ValueError or RuntimeError above says why. If it is out "
            "of memory, lower --gpu-memory-utilization, --kv-cache-memory-bytes or --max-model-len"
        ) from None
    return 1 if shutdown.engine_died() else 0


def check_model(directory: Path) -> bool:
    """Refuse what cannot be served, before vLLM starts; reads headers only.

    Returns:
        Whether it is an svdserve checkpoint; if not, it is a dense model.

    Raises:
        UserError: the model does not exist, or its files are malformed.
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


def take_keys(
    options: SecurityOptions, extra_args: Sequence[str]
) -> tuple[SecurityOptions, list[str]]:
    """Move vLLM's API keys from the flags and the environment to the options.

    vLLM's own check leaves routes open (see security.py), so it is never switched on beside ours.

    Returns:
        The options with these keys, and the flags without them.

    Raises:
        UserError: one of them is not a valid key.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key", "--api_key", nargs="*", action="extend", default=[])
    given, others = parser.parse_known_args(extra_args)
    digests = {digest_of(key, "--api-key") for key in given.api_key}
    if key := os.environ.pop("VLLM_API_KEY", ""):
        digests.add(digest_of(key, "VLLM_API_KEY"))
    return options.model_copy(update={"api_keys": options.api_keys | digests}), others


def server_arguments(
    directory: str, extra_args: Sequence[str], *, guarded: bool = False
) -> list[str]:
    """The user's flags with our middleware, and with our defaults for those that are absent.

    Args:
        directory: a model that check_model has accepted.
        extra_args: flags of `vllm serve`.
        guarded: whether requests need a key; if not, a warning is printed when the server listens
            to other machines.

    Raises:
        UserError: the port is taken or invalid, the memory does not suffice, or ``--config`` names
            no file of flags, or one with an API key.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--uds")
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
    parser.add_argument("--shutdown-timeout", "--shutdown_timeout")
    parser.add_argument("--worker-extension-cls", "--worker_extension_cls")
    parser.add_argument("--load-format", "--load_format")
    add_memory_flags(parser)
    try:
        given, _ = parser.parse_known_args([*configured_flags(extra_args), *extra_args])
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    arguments = list(extra_args)
    if given.uds is None:
        host = DEFAULT_HOST if given.host is None else given.host
        check_port(host, given.port)
        if given.host is None:
            arguments += ["--host", DEFAULT_HOST]
        if not guarded and not _is_loopback(host):
            print(
                f"warning: anyone who can reach {host or 'this machine'}:{given.port} can use the "
                "model; give --api-keys-file FILE, or leave out --host",
                file=sys.stderr,
            )
    if given.served_model_name is None:
        # vLLM would show clients the directory as it was typed, or the folder of the Hub's cache.
        arguments += ["--served-model-name", model_name(directory)]
    if given.shutdown_timeout is None:
        arguments += ["--shutdown-timeout", str(DEFAULT_GRACE_SECONDS)]
    if given.worker_extension_cls is None:
        arguments += ["--worker-extension-cls", EXTENSION]
    if given.load_format is None and serves_on_cpu() and not _is_quantized(Path(directory)):
        arguments += ["--load-format", LOAD_FORMAT]
    for module in (security, shutdown):  # the last is the outermost
        arguments += ["--middleware", module.MIDDLEWARE]
    if serves_on_cpu() and given.nnodes == 1:
        workers = given.tensor_parallel_size or 1
        check_memory(Path(directory), given.dtype, given.kv_cache_memory_bytes, workers)
    return arguments


def _is_quantized(directory: Path) -> bool:
    """Whether the configuration of a model tells how its weights are stored, as ours does."""
    return bool(read_json(directory / "config.json").get("quantization_config"))


def configured_flags(extra_args: Sequence[str]) -> list[str]:
    """The flags in the YAML file of vLLM's ``--config``; the command line overrides them.

    Raises:
        UserError: the file cannot be read, is no mapping of flags, or has an API key.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file = parser.parse_known_args(extra_args)[0].config
    if file is None:
        return []
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {file}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {file}: give a mapping of flags, such as port: 8000")
    if {"api-key", "api_key"} & set(settings):
        # vLLM would check this key itself, and leave routes open (see security.py).
        raise UserError(
            f"--config {file}: has an api-key; give it with --api-key or --api-keys-file instead"
        )
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        elif not isinstance(value, bool | None):
            flags += [f"--{name}", *map(str, values)]
    return flags


def configured_model(words: Sequence[str]) -> str | None:
    """The model that the file of ``--config`` names, if the words have that flag.

    Raises:
        UserError: see ``configured_flags``.
    """
    flags = configured_flags(words)
    return flags[flags.index("--model") + 1] if "--model" in flags else None


def refuse_compressed_draft(flags: Sequence[str]) -> None:
    """Refuse a draft model of speculative decoding that svdserve compressed.

    The plug-in refuses it too, but in a worker, after minutes, and below a stack trace.

    Raises:
        UserError: the flags name such a draft.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--speculative-config", "--speculative_config", "-sc", default="{}")
    parser.add_argument(
        *("--speculative-config.model", "--speculative_config.model", "-sc.model"),
        *("--spec-model", "--spec_model"),
        dest="model",
    )
    given, _ = parser.parse_known_args(flags)
    try:
        settings = json.loads(given.speculative_config)
    except ValueError:
        return  # vLLM says what is wrong with it
    named = settings.get("model") if isinstance(settings, dict) else None
    draft = given.model or (named if isinstance(named, str) else None)
    if draft and Path(draft).is_dir() and is_checkpoint(Path(draft)):
        raise UserError(
            f"{draft}: a compressed model is not supported as the draft of speculative decoding; "
            "give its dense model as the draft"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raise UserError unless this process could listen on ``host:port``."""
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
    """The names for VLLM_PLUGINS that add our endpoint plug-in and remove no other plug-in.

    vLLM loads endpoint plug-ins only if this variable names them, and then treats it as an
    allow-list for every group of plug-ins. An unset variable allows all, so all must be named.
    Endpoint plug-ins of other packages stay out, as they do in vLLM.
    """
    if current is not None:
        return sorted({*current.split(","), PLUGIN} - {""})
    entry_points = importlib.metadata.entry_points()
    groups = {group for group in entry_points.groups if group.startswith("vllm.")}
    groups.discard(ENDPOINT_GROUP)
    named = {entry.name for group in groups for entry in entry_points.select(group=group)}
    return sorted(named | {PLUGIN})
