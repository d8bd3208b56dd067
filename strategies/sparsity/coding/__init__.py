"""The compressed file: :func:`save_compressed` and :func:`load_compressed`.

``fields`` (numbers and bytes) is the ground; ``ans`` and ``huffman`` code symbols, and ``streams`` keeps them in
bounds; ``positions`` are gaps, ``tensors`` chooses how to store each tensor, and ``file`` keeps them all in one file.
"""

from .errors import CompressedFileError
from .file import load_compressed, save_compressed
from .streams import Coder

__all__ = ["Coder", "CompressedFileError", "load_compressed", "save_compressed"]
