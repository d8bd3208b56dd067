"""The codes ``int8`` and ``1bit``: the functions that codecs call, and the compiled kernel."""

from .function import decode_int8, decode_signs, encode_int8, encode_signs

__all__ = ["decode_int8", "decode_signs", "encode_int8", "encode_signs"]
