"""Low-rank linear kernels. ``lowrank_linear`` is the one public operation.

``prepare`` computes the same for a layer, whose factors are packed once and multiplied many times,
also in int8, and for weights that are not factored.
"""

from svdserve.kernels.operation import lowrank_linear, prepare
from svdserve.kernels.parts import Activation, Int8Matrix, Int8Part, Part, WholePart
from svdserve.kernels.registry import NoImplementation

__all__ = [
    "Activation",
    "Int8Matrix",
    "Int8Part",
    "NoImplementation",
    "Part",
    "WholePart",
    "lowrank_linear",
    "prepare",
]
