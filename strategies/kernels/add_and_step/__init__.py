"""A worker's local step and the sum of its gradients in one pass: the function that it calls, and the kernel."""

from .function import add_and_step

__all__ = ["add_and_step"]
