"""Defines torch operations whose Python bodies torch.compile does not trace.

torch.library.custom_op does the same, but its extra checks at every call would slow down every
layer of a decoding step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("svdserve", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define ``svdserve::...`` for all devices.

    Args:
        schema: name, arguments and result, in the language of torch's operators.
        run: computes the result, outside autograd.
        fake: returns an empty tensor with the shape, dtype and strides of the result.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"svdserve::{name}", fake, lib=_LIBRARY)
