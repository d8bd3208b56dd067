"""The code ``topk``: the function that the codec calls, and the compiled kernel."""

from .function import encode_top_k

__all__ = ["encode_top_k"]
