"""A filter of vLLM's log, which removes the stack traces of bad requests."""

import logging

from vllm.exceptions import VLLMClientError


def without_trace(record: logging.LogRecord) -> bool:
    """Keep every record, but remove the stack trace from those about a bad request."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("vllm.entrypoints.") and isinstance(
        error, (VLLMClientError, ValueError, TypeError, OverflowError, NotImplementedError)
    ):
        # vLLM answers these errors with a 4xx status: exception_handling/error_response.py.
        record.exc_info = record.exc_text = None
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__})", ()
    return True
