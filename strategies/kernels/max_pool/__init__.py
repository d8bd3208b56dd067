"""Maxima over windows of an image, for inference: the function users call, and the compiled kernel."""

from .function import max_pool2d

__all__ = ["max_pool2d"]
