"""The fused low-rank linear for x86 processors with AVX512-BF16, and AMX if they have it."""

from svdserve.kernels.cpu.build import library, openmp_libraries, unsupported
from svdserve.kernels.cpu.linear import PackedFactors

__all__ = ["PackedFactors", "library", "openmp_libraries", "unsupported"]
