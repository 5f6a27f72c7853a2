"""The operations of MIL, computed with torch: one module a family, all in one table."""

from runtimes.mil.ops import attention, compressed, convolution, elementwise, index, matrix, norm, reduce, shape, state
from runtimes.mil.ops.table import KERNELS, Kernel, Parameter

__all__ = ["KERNELS", "Kernel", "Parameter"]
_FAMILIES = (attention, compressed, convolution, elementwise, index, matrix, norm, reduce, shape, state)
