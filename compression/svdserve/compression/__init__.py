"""Compression of language models with SVD.

Importing this package makes transformers know its checkpoints: ``from_pretrained`` then loads them.
Nothing heavy is imported for that. transformers has no entry points for quantizers, so an object on
sys.meta_path waits for the module that holds transformers' table of them.
"""

from importlib.metadata import PackageNotFoundError, version

from svdserve.compression.hook import register_with_transformers

try:
    __version__ = version("svdserve")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "unknown"

register_with_transformers()
