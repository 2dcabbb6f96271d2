"""Tells errors that the user can correct from faults of svdserve itself."""

import errno

from pydantic import ValidationError
from safetensors import SafetensorError

from svdserve.compression.system.errors import UserError, explain
from svdserve.compression.system.files import reason

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class EngineDied(RuntimeError):
    """A process of vLLM ended too early; the message holds the end of its log."""


def user_message(error: Exception) -> str | None:
    """The message for a user who can correct the error; None if it is a fault of svdserve."""
    match error:
        case UserError():
            return str(error)
        case ValidationError():
            return explain(error)
        case UnicodeError():
            return f"a file is no UTF-8 text ({error}); save it as UTF-8"
        case SafetensorError():
            return f"a safetensors file cannot be read or written ({error}); copy the model again"
        case ModuleNotFoundError() if not (error.name or "svdserve").startswith("svdserve"):
            return f"{error}; pip install 'svdserve[cpu]' or 'svdserve[gpu]' brings it"
        case OSError():
            return _system_message(error)
    if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
        first = (str(error).splitlines() or ["no memory"])[0]
        return f"out of memory ({first}); give fewer --tokens, or --batch-size 1 and --offload DIR"
    return None


def _system_message(error: OSError) -> str:
    first = (reason(error).splitlines() or [type(error).__name__])[0]
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}{first}; free some space"
    return f"{where}{first}; give a path that exists and that you may use"
