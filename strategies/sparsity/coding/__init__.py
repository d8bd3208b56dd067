"""The compressed file: :func:`save_compressed` and :func:`load_compressed`.

``fields`` (numbers and bytes) is the ground; ``ans`` and ``huffman`` code symbols, and ``streams`` keeps them in
bounds; ``positions`` are gaps, ``tensors`` chooses how to store each tensor, and ``file`` keeps them all in one file.
``trees`` makes tensors of what is none, and ``state`` writes state_dicts.
"""

from .errors import CompressedFileError
from .file import is_compressed
from .state import check_state_dict, load_compressed, save_compressed
from .streams import Coder

__all__ = [
    "Coder",
    "CompressedFileError",
    "check_state_dict",
    "is_compressed",
    "load_compressed",
    "save_compressed",
]
