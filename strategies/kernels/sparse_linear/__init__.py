"""A sparse matrix times vectors: the packed format, the functions users call, and the paths behind them."""

from .function import sparse_linear, sparse_linear_live, sparse_weight_grad
from .packed import LivePositions, PackedWeight, pack_codes, pack_dense, pack_gaps, pack_live, pack_values

__all__ = [
    "LivePositions",
    "PackedWeight",
    "pack_codes",
    "pack_dense",
    "pack_gaps",
    "pack_live",
    "pack_values",
    "sparse_linear",
    "sparse_linear_live",
    "sparse_weight_grad",
]
