"""Locally connected layers: windows as of a convolution, with weights of their own at each place."""

from .function import locally_connected2d, locally_connected_transpose2d

__all__ = ["locally_connected2d", "locally_connected_transpose2d"]
