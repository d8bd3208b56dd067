"""Direct sparse convolution: the function users call, the compiled kernel, its plans, and the Torch path."""

from .function import sparse_conv2d

__all__ = ["sparse_conv2d"]
