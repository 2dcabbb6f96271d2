"""What svdserve leaves out of vLLM's log."""

import logging

from vllm.exceptions import VLLMClientError


def without_trace(record: logging.LogRecord) -> bool:
    """A filter that keeps every record, but takes the trace from those about a bad request."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("vllm.entrypoints.") and isinstance(
        error, (VLLMClientError, ValueError, TypeError, OverflowError, NotImplementedError)
    ):
        # These are what vLLM answers 4xx to: exception_handling/error_response.py.
        record.exc_info = record.exc_text = None
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__})", ()
    return True
