"""One tensor as bytes, bit for bit: its positions and its values, each coded as it takes the fewest bytes.

The bytes begin with the data type, the shape and the layout. A layout is either dense, where every element has a code,
or sparse, where only those have that aren't zero, and their positions precede them. The values are a codebook, in
ascending order of their bits, and codes; or, in a sparse layout, the values themselves. Positions run along rows or
along columns: pruned nets have dead inputs and dead outputs, and it depends which are more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from squall.sparsity.report import TensorStatistics

from . import positions, streams
from .errors import CompressedFileError
from .fields import Bytes, Reader, number
from .figures import statistics_of
from .ways import COLUMNS, MAX_VALUES, SHARED, SPARSE, Words, count_values, to_rows, ways_of

# A data type's place in this list is its number in the file: only ever append.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip

MAX_DIMS = 64
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorInfo(NamedTuple):
    """What a coded tensor says it is.

    Args:
        dtype: Its data type.
        shape: Its shape.

    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements; a Python integer, which doesn't overflow."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.num_elements * self.dtype.itemsize


def to_words(tensor: Tensor) -> Words:
    """See a tensor as unsigned integers.

    Args:
        tensor: Of any data type in `DTYPES`, and on any device.

    Returns:
        Its bits, in one dimension; a view if the tensor is contiguous and on the CPU.

    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    words: Words = tensor.reshape(-1).view(_INTS[tensor.dtype.itemsize]).numpy()
    return words.view(f"u{tensor.dtype.itemsize}")


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Say which elements of which memory a tensor is.

    Args:
        tensor: Any tensor.

    Returns:
        What is equal for tensors that are one and the same; empty for one that has no elements.

    """
    if not tensor.numel():
        return ()
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*memory, tensor.is_conj(), tensor.is_neg())


def encode(
    name: str, tensor: Tensor, coder: streams.Coder, gap_bits: int | None = None
) -> tuple[bytes | None, TensorStatistics]:
    """Code a tensor in the way that takes the fewest bytes.

    Args:
        name: Its key.
        tensor: The tensor.
        coder: "ans" or "huffman".
        gap_bits: Bits of a distance between weights before it is coded; None: those that take the fewest bytes.

    Returns:
        The bytes, or None if the tensor as it is takes no more; and what it came to.

    """
    words = to_words(tensor)
    places = np.flatnonzero(words)
    counted = count_values(words[places])
    shape = tuple(tensor.shape)
    head = number(DTYPES.index(tensor.dtype)) + number(len(shape)) + b"".join(map(number, shape))
    best = streams.smallest(ways_of(words, places, counted, shape, coder, gap_bits))
    if len(head) + 1 + best.num_bytes < words.nbytes:
        parts = best.encode()
        payload = head + number(best.layout) + b"".join(parts)
        if len(payload) < words.nbytes:
            return payload, statistics_of(name, words, places, counted, best.layout, parts, len(payload), gap_bits)
    bits = 8 * words.itemsize
    as_it_is = TensorStatistics(name, words.size, len(places), words.nbytes, words.nbytes, words.nbytes, bits, bits)
    return None, as_it_is


def read_info(reader: Reader) -> TensorInfo:
    """Read what a coded tensor says it is.

    Args:
        reader: Stands where the tensor's bytes begin.

    Returns:
        Its data type and shape. Nothing of that size has been allocated.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    dtype = DTYPES[reader.number(len(DTYPES) - 1)]
    shape = tuple(reader.number((1 << 63) - 1) for _ in range(reader.number(MAX_DIMS)))
    return TensorInfo(dtype, shape)


def decode(data: Bytes) -> Tensor:
    """Decode a tensor.

    Args:
        data: What :func:`encode` returned. Whoever calls this has compared what :func:`read_info` says of the size with
            the memory there is.

    Returns:
        The tensor.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    reader = Reader(data)
    info = read_info(reader)
    if not info.num_elements:
        raise CompressedFileError("it has no elements, and is coded all the same")
    layout = reader.number(SPARSE | SHARED | COLUMNS)
    word = np.dtype(f"<u{info.dtype.itemsize}")
    places, num_stored = None, info.num_elements
    if layout & SPARSE:
        num_stored = reader.number(info.num_elements)
        places = positions.decode(reader, num_stored, info.num_elements)
        if layout & COLUMNS and num_stored:
            places = to_rows(places, info.shape)
    if layout & SHARED:
        codebook = _checked(reader.take(reader.number(MAX_VALUES) * word.itemsize).view(word), info.dtype)
        if not len(codebook) and num_stored:
            raise CompressedFileError("its codebook is empty")
        values = codebook if len(codebook) < 2 else codebook[streams.decode(reader, num_stored, len(codebook))]
    else:
        values = _checked(reader.take(num_stored * word.itemsize).view(word), info.dtype)
    reader.end()
    words = np.zeros(info.num_elements, word.newbyteorder("="))
    words[slice(None) if places is None else places] = values
    signed = words.view(f"i{word.itemsize}" if word.itemsize > 1 else "u1")  # what torch and numpy share
    return torch.from_numpy(signed).view(info.dtype).reshape(info.shape)


def _checked(values: Words, dtype: torch.dtype) -> Words:
    if dtype == torch.bool and (values > 1).any():
        raise CompressedFileError("a truth value is neither 0 nor 1")
    return values
