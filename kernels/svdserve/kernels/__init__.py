"""Low-rank linear kernels. ``lowrank_linear`` is the one public operation.

``prepare`` computes the same for a layer, whose factors are packed once and multiplied many times.
"""

from svdserve.kernels.operation import lowrank_linear, prepare
from svdserve.kernels.parts import Activation, Part
from svdserve.kernels.registry import NoImplementation

__all__ = ["Activation", "NoImplementation", "Part", "lowrank_linear", "prepare"]
