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
import numpy.typing as npt
import torch
from torch import Tensor

from squall.sparsity.report import TensorStatistics

from . import positions, streams
from .errors import CompressedFileError
from .fields import Budget, Bytes, Reader, number
from .figures import statistics_of
from .streams import Decoded
from .ways import COLUMNS, MAX_VALUES, SHARED, SPARSE, Words, along_rows, count_values, to_rows, ways_of

_E8M0 = (torch.float8_e8m0fnu,) if hasattr(torch, "float8_e8m0fnu") else ()  # torch 2.6 has none
# A data type's place in this list is its number in the file: only ever append.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.complex128, torch.complex32, *_E8M0,
)  # fmt: skip
_FOREIGN = frozenset((torch.complex128, torch.complex32, *_E8M0))
"""Those that the safetensors library doesn't write: they are bytes of ours even where coding makes them no smaller."""

MAX_DIMS = 64
_MAX_WORD = 8
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


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


class Encoded(NamedTuple):
    """What coding a tensor has made of it.

    Args:
        payload: The bytes; None if the tensor as it is takes no more.
        figures: What it came to.
        num_symbols: What has to be decoded.

    """

    payload: bytes | None
    figures: TensorStatistics
    num_symbols: int


def to_words(tensor: Tensor) -> Words:
    """See a tensor as unsigned integers.

    Args:
        tensor: Of any data type in `DTYPES`, and on any device.

    Returns:
        Its bits, in one dimension; a view if the tensor is contiguous and on the CPU. No integer has 16 bytes: of those
        they are complex numbers, whose bits nobody touches.

    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    words: Words = tensor.reshape(-1).view(_INTS[tensor.dtype.itemsize]).numpy()
    return words.view(_word(tensor.dtype.itemsize))


def _word(num_bytes: int) -> np.dtype[Any]:
    return np.dtype(f"u{num_bytes}" if num_bytes <= _MAX_WORD else f"c{num_bytes}")


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


def encode(name: str, tensor: Tensor, coder: streams.Coder, gap_bits: int | None = None) -> Encoded:
    """Code a tensor in the way that takes the fewest bytes.

    Args:
        name: Its key.
        tensor: The tensor.
        coder: "ans" or "huffman".
        gap_bits: Bits of a distance between weights before it is coded; None: those that take the fewest bytes.

    Returns:
        The bytes, and what it came to.

    """
    words = to_words(tensor)
    places = np.flatnonzero(words)
    shape = tuple(tensor.shape)
    head = number(DTYPES.index(tensor.dtype)) + number(len(shape)) + b"".join(map(number, shape))
    if words.itemsize <= _MAX_WORD:
        counted = count_values(words[places])
        best = streams.smallest(ways_of(words, places, counted, shape, coder, gap_bits))
        if len(head) + 1 + best.num_bytes < words.nbytes:
            parts = best.encode()
            payload = head + number(best.layout) + b"".join(parts)
            if len(payload) < words.nbytes:
                figures = statistics_of(name, words, places, counted, best.layout, parts, len(payload), gap_bits)
                return Encoded(payload, figures, best.num_symbols)
    bits = 8 * words.itemsize
    as_bytes = (
        head + number(0) + words.astype(words.dtype.newbyteorder("<")).tobytes() if tensor.dtype in _FOREIGN else None
    )
    num_bytes = words.nbytes if as_bytes is None else len(as_bytes)
    figures = TensorStatistics(name, words.size, len(places), words.nbytes, num_bytes, words.nbytes, bits, bits)
    return Encoded(as_bytes, figures, 0)


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


class Live(NamedTuple):
    """The elements of a tensor that aren't zero; looked up by numpy, as torch would start threads for it.

    Args:
        positions: Theirs in the flat tensor, ascending; int32 where all of the tensor's fit.
        codes: Places in `values`, or None.
        values: One a position; or the codebook.
        shape: Of the tensor.

    """

    positions: Tensor
    codes: Tensor | None
    values: Tensor
    shape: tuple[int, ...]

    @property
    def density(self) -> float:
        """Share of the elements."""
        return len(self.positions) / max(1, math.prod(self.shape))

    def each(self) -> Tensor:
        """Look up the value of each position."""
        if self.codes is None:
            return self.values
        # Without a look at each code: decoding has compared it with the codebook.
        each = np.take(_to_words(self.values), self.codes.numpy(), mode="clip")
        return _from_words(each, self.values.dtype)

    def dense(self) -> Tensor:
        """Build the tensor."""
        each = _to_words(self.each())
        dense = np.zeros(math.prod(self.shape), each.dtype)
        dense[self.positions.numpy()] = each
        return _from_words(dense, self.values.dtype).reshape(self.shape)


class LiveGaps(NamedTuple):
    """The elements of a tensor that aren't zero, by the gaps between them.

    Args:
        gaps: To the next one, the first from -1 on; 0 goes on by `longest` to none.
        longest: See there.
        codes: Places in `values`, or None.
        values: One an element; or the codebook.

    """

    gaps: Tensor
    longest: int
    codes: Tensor | None
    values: Tensor


class CodedTensor(NamedTuple):
    """A tensor that has been read, and is still to be decoded.

    Args:
        info: Its data type and shape.
        layout: The flags of its layout.
        places: Where the stored elements are; None: all are stored.
        values: The codebook, or the elements themselves.
        codes: Places in the codebook; None where there are no elements, or all of them are one, or each has its own.

    """

    info: TensorInfo
    layout: int
    places: positions.Coded | None
    values: Words
    codes: streams.Coded | None

    @property
    def num_stored(self) -> int:
        """How many elements are stored: in a sparse layout those that aren't zero."""
        return self.info.num_elements if self.places is None else self.places.num_positions

    @property
    def streams(self) -> list[streams.Coded]:
        """What has to be decoded."""
        both = (None if self.places is None else self.places.stream, self.codes)
        return [stream for stream in both if stream is not None]

    def dense(self) -> Tensor:
        """Decode the tensor; once, as its code is let go of.

        Raises:
            CompressedFileError: If the bytes are none that :func:`encode` writes.

        """
        info = self.info
        if not info.num_elements:
            if math.prod(max(size, 1) for size in info.shape[1:]) >= 1 << 63:
                raise CompressedFileError(f"its shape is {info.shape}, whose strides overflow")
            return torch.empty(info.shape, dtype=info.dtype)
        places = None if self.places is None else self.places.positions()
        values = self.values if self.codes is None else self.values[self.codes.symbols()]
        words = np.zeros(info.num_elements, self.values.dtype.newbyteorder("="))
        if places is None:
            words[:] = values
        elif len(places):
            words[to_rows(places, info.shape) if self.layout & COLUMNS else places] = values
        return _from_words(words, info.dtype).reshape(info.shape)

    def live(self) -> Live:
        """Decode the elements that aren't zero, and never a whole tensor of values; once.

        Raises:
            CompressedFileError: If the bytes are none that :func:`encode` writes.

        """
        codes, values = self._codes_and_values()
        if self.places is not None:
            places = self.places.positions()
            if self.layout & COLUMNS and codes is None:
                places, values = along_rows(places, values, self.info.shape)
            elif self.layout & COLUMNS:
                assert codes is not None
                places, codes = along_rows(places, codes, self.info.shape)
        elif codes is not None:
            places = np.flatnonzero((values != 0)[codes]) if len(codes) else np.flatnonzero(codes)
            codes = codes[places]
        else:
            places = np.flatnonzero(values)
            values = values[places]
        shared = None if codes is None else torch.from_numpy(codes)
        return Live(torch.from_numpy(places), shared, _from_words(values, self.info.dtype), self.info.shape)

    def gaps(self) -> LiveGaps | None:
        """Decode the elements that aren't zero, but for their positions; once.

        Returns:
            None if the file doesn't have the gaps between them along rows; then :meth:`live` is still to be called.

        Raises:
            CompressedFileError: If the bytes are none that :func:`encode` writes.

        """
        if self.places is None or self.layout & COLUMNS:
            return None
        codes, values = self._codes_and_values()
        gaps, shared = (
            torch.from_numpy(self.places.stream.symbols()),
            None if codes is None else torch.from_numpy(codes),
        )
        return LiveGaps(gaps, self.places.longest, shared, _from_words(values, self.info.dtype))

    def _codes_and_values(self) -> tuple[Decoded | None, Words]:
        """Decode what is stored, but for its positions."""
        values = self.values.astype(self.values.dtype.newbyteorder("="))  # a copy, of the file that may be replaced
        if self.codes is not None:
            return self.codes.symbols(), values
        # Of one value, if any.
        return np.zeros(self.num_stored, np.uint8) if self.layout & SHARED else None, values


def _to_words(values: Tensor) -> npt.NDArray[Any]:
    """What numpy, too, has a name for."""
    words: npt.NDArray[Any] = values.view(_INTS[values.itemsize]).numpy()
    return words


def _from_words(words: Words, dtype: torch.dtype) -> Tensor:
    if words.itemsize <= _MAX_WORD:
        words = words.view(f"i{words.itemsize}" if words.itemsize > 1 else "u1")  # what torch and numpy share
    return torch.from_numpy(words).view(dtype)


def read(data: Bytes, budget: Budget | None = None) -> CodedTensor:
    """Read a tensor, and don't decode it.

    Args:
        data: What :func:`encode` returned. Whoever calls this has compared what :func:`read_info` says of the size with
            the memory there is.
        budget: Of the file; None: one for this tensor alone.

    Returns:
        The tensor, all of whose bytes have been looked at as far as it goes without decoding.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    reader = Reader(data, budget)
    info = read_info(reader)
    layout = reader.number(SPARSE | SHARED | COLUMNS)
    if layout and not info.num_elements:
        raise CompressedFileError("it has no elements, and is coded all the same")
    word = _word(info.dtype.itemsize).newbyteorder("<")
    if layout and word.itemsize > _MAX_WORD:
        raise CompressedFileError("numbers of 16 bytes aren't coded")
    places, codes, num_stored = None, None, info.num_elements
    if layout & SPARSE:
        num_stored = reader.number(info.num_elements)
        places = positions.read(reader, num_stored, info.num_elements)
    if layout & SHARED:
        values = _checked(reader.take(reader.number(MAX_VALUES) * word.itemsize).view(word), info.dtype)
        if not len(values) and num_stored:
            raise CompressedFileError("its codebook is empty")
        codes = streams.read(reader, num_stored, len(values)) if len(values) > 1 else None
    else:
        values = _checked(reader.take(num_stored * word.itemsize).view(word), info.dtype)
    reader.end()
    return CodedTensor(info, layout, places, values, codes)


def _checked(values: Words, dtype: torch.dtype) -> Words:
    if dtype == torch.bool and (values > 1).any():
        raise CompressedFileError("a truth value is neither 0 nor 1")
    return values
