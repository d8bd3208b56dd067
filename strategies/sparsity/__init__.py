"""Which weights exist: pruned, shared, and coded as one small file."""

from .coding import CompressedFileError, load_compressed, save_compressed
from .magnitude import magnitude_mask
from .report import CompressionReport, TensorStatistics
from .sharing import SharedWeights, share_weights

__all__ = [
    "CompressedFileError",
    "CompressionReport",
    "SharedWeights",
    "TensorStatistics",
    "load_compressed",
    "magnitude_mask",
    "save_compressed",
    "share_weights",
]
