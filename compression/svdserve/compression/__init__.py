"""Compression of language models with SVD: the public Python API.

    from svdserve.compression import Recipe, compress, evaluate

    compress("model", Path("small"), Recipe(keep=0.8))
    evaluate(["model", "small"], texts=[Path("text.txt")])

Importing this package registers its checkpoints with transformers: ``from_pretrained`` then loads
them. The import loads neither torch nor transformers. transformers has no entry points for
quantizers, so a finder on sys.meta_path waits for the module that holds transformers' table of
quantizers. Each name of the API is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svdserve.compression.model.hook import register_with_transformers

if TYPE_CHECKING:
    from svdserve.compression.evaluation.compare import compare
    from svdserve.compression.evaluation.evaluate import evaluate
    from svdserve.compression.format.reader import open_checkpoint
    from svdserve.compression.pipeline.job import compress
    from svdserve.compression.pipeline.recipe import Recipe, Run
    from svdserve.compression.pipeline.stages.refine import refine

    __version__: str

_PLACES = {
    "Recipe": "pipeline.recipe",
    "Run": "pipeline.recipe",
    "compare": "evaluation.compare",
    "compress": "pipeline.job",
    "evaluate": "evaluation.evaluate",
    "open_checkpoint": "format.reader",
    "refine": "pipeline.stages.refine",
}

__all__ = [
    "Recipe",
    "Run",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "open_checkpoint",
    "refine",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    if name != "__version__":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("svdserve")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
