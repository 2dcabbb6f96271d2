"""Codecs define how a matrix of a module is encoded in tensors; each has its own file.

``CODECS`` holds them by name. An installed package adds a codec by an entry point of the group
``svdserve.codecs``.
"""

from collections.abc import Iterable

from svdserve.compression.format.codecs.base import Codec, Storage
from svdserve.compression.format.codecs.floating import Float
from svdserve.compression.format.codecs.int8 import Int8
from svdserve.compression.system.registry import Registry

CODECS: Registry[Codec] = Registry("codec", "svdserve.codecs", Codec)  # type: ignore[type-abstract]
FLOAT, INT8 = Float(), Int8()
for _codec in (FLOAT, INT8):
    CODECS.add(_codec.name, _codec)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UserError: no codec has this name; the message lists all names.
    """
    return CODECS.get_known(name)


def revisions(names: Iterable[str]) -> dict[str, int]:
    """The revisions of the codecs of these names, for the signature of a job.

    A first revision is not named, as jobs of before there were revisions do not name it.
    """
    codecs = {name: get_codec(name) for name in sorted(set(names))}
    return {f"revision of {name}": c.revision for name, c in codecs.items() if c.revision > 1}


__all__ = ["CODECS", "FLOAT", "INT8", "Codec", "Storage", "get_codec", "revisions"]
