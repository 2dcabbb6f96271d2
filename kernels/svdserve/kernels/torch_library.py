"""Defines torch operations whose Python bodies torch.compile does not look into.

torch.library.custom_op does the same with more checks at every call, which a decoding step pays for
every layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("svdserve", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define ``svdserve::...`` for all devices.

    Args:
        schema: name, arguments and result, in the language of torch's operators.
        run: computes it; outside autograd.
        fake: an empty tensor of the result's shape, dtype and strides.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"svdserve::{name}", fake, lib=_LIBRARY)
