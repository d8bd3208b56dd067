"""Codes of asymmetric numeral systems decoded side by side, and positions of gaps."""

from .function import Code, Gaps, decode, positions, turn
from .interleaved import Interleaved, decode_interleaved, encode_interleaved

__all__ = ["Code", "Gaps", "Interleaved", "decode", "decode_interleaved", "encode_interleaved", "positions", "turn"]
