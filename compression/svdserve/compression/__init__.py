"""Compression of language models with SVD.

Importing this package makes transformers know its checkpoints: ``from_pretrained`` then loads them.
Nothing heavy is imported for that. transformers has no entry points for quantizers, so an object on
sys.meta_path waits for the module that holds transformers' table of them.
"""

from svdserve.compression.model.hook import register_with_transformers

register_with_transformers()


def __getattr__(name: str) -> str:
    """``__version__``, found when it is asked for: the hook imports this at every start."""
    if name != "__version__":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("svdserve")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"
