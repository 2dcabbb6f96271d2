"""Statistics of inputs and gradients, which methods use, and the linear algebra on them.

Importing this package registers every statistic.
"""

from svdserve.compression.statistics import of_gradients, of_inputs

__all__ = ["of_gradients", "of_inputs"]
