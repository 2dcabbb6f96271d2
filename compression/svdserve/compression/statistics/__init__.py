"""What methods know of inputs and gradients, and the linear algebra on it.

Importing this package registers every statistic.
"""

from svdserve.compression.statistics import of_gradients, of_inputs

__all__ = ["of_gradients", "of_inputs"]
