"""Codes of asymmetric numeral systems decoded side by side, and positions of gaps."""

from .function import Code, decode, positions

__all__ = ["Code", "decode", "positions"]
