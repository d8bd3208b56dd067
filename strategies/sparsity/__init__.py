"""Which weights exist: masks and the algorithms that move them; pruned, shared, and coded as one small file."""

from .algorithms import SET, DynamicSparsity, RigL, SparseAlgorithm, SparseMomentum, Static, Update
from .checkpoint_io import CompressedCheckpointIO
from .coding import CompressedFileError, load_compressed, save_compressed
from .deep_compression import DeepCompression
from .functions import apportion, grows, prunes, redistributions
from .inference import InferenceReport, LayerChoice, to_inference
from .layers import Layer, densities, find_layers, largest, smallest
from .magnitude import magnitude_mask
from .registry import reads
from .report import CompressionReport, TensorStatistics
from .sharing import SharedWeights, share_weights
from .training import MaskedTraining

__all__ = [
    "SET",
    "CompressedCheckpointIO",
    "CompressedFileError",
    "CompressionReport",
    "DeepCompression",
    "DynamicSparsity",
    "InferenceReport",
    "Layer",
    "LayerChoice",
    "MaskedTraining",
    "RigL",
    "SharedWeights",
    "SparseAlgorithm",
    "SparseMomentum",
    "Static",
    "TensorStatistics",
    "Update",
    "apportion",
    "densities",
    "find_layers",
    "grows",
    "largest",
    "load_compressed",
    "magnitude_mask",
    "prunes",
    "reads",
    "redistributions",
    "save_compressed",
    "share_weights",
    "smallest",
    "to_inference",
]
