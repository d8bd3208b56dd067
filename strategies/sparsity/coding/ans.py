"""Asymmetric numeral systems (Duda 2014), by the library ``constriction``: the entropy, and a word above it.

The model is one byte a symbol. Its highest five bits are an exponent e and its lowest three a mantissa m: the symbol's
share is (8 + m) 2^e, and 0 is a symbol that doesn't occur. These shares are right to 6 %, which costs a thousandth of a
bit a symbol; frequencies of four bytes would cost more than that for all but the longest streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import constriction
import numpy as np
import numpy.typing as npt

from squall.kernels import ans as kernel
from squall.kernels import native

from .errors import CompressedFileError
from .fields import Bytes, Reader, number

MAX_KINDS = 1 << 16
"""Each symbol has at least a share of 2^-24: the library's, so that it can be coded."""
WORD_BYTES = 4
_BYTES = np.arange(256)
SHARES = np.where(_BYTES > 0, (8.0 + (_BYTES & 7)) * 2.0 ** (_BYTES >> 3), 0.0)
"""By byte of a model: whole numbers below 2^36, so that sums of them are exact."""
_MIDPOINTS = (SHARES[1:] + SHARES[:-1]) / 2

_Counts = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.uint16]


def table_of(counts: _Counts) -> Bytes:
    """Make the model of symbols.

    Args:
        counts: How often each occurs; at least two do.

    Returns:
        A byte a symbol, up to the last one that occurs.

    """
    table = np.searchsorted(_MIDPOINTS, counts * (SHARES[-1] / counts.max()))
    table[counts > 0] = np.maximum(table[counts > 0], 1)
    return np.asarray(table[: int(np.flatnonzero(counts)[-1]) + 1], np.uint8)


def _model(table: Bytes) -> constriction.stream.model.Categorical:
    # The shares are exact in float64, and with perfect=False what follows is a few exactly rounded operations.
    return constriction.stream.model.Categorical(SHARES[table], perfect=False)


def size(counts: _Counts) -> int:
    """Say how many bytes a stream takes.

    Args:
        counts: How often each symbol occurs; at least two of them do.

    Returns:
        The number of bytes, to within a word or two.

    """
    table = table_of(counts)
    shares, counts = SHARES[table], counts[: len(table)]
    present = counts > 0
    bits = float(-(counts[present] * np.log2(shares[present] / shares.sum())).sum())
    return len(number(len(table))) + len(table) + len(number(int(bits) // 32)) + (int(bits) // 32 + 1) * WORD_BYTES


def encode(symbols: npt.NDArray[np.int32], counts: _Counts) -> bytes:
    """Code symbols.

    Args:
        symbols: The symbols.
        counts: How often each of them occurs; at least two do.

    Returns:
        The model and the code.

    """
    table = table_of(counts)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, _model(table))
    words = np.asarray(coder.get_compressed(), "<u4").tobytes()
    return number(len(table)) + table.tobytes() + number(len(words) // WORD_BYTES) + words


def read_table(reader: Reader, num_kinds: int) -> Bytes:
    """Read a model.

    Args:
        reader: Stands where it begins.
        num_kinds: How many symbols there may be.

    Raises:
        CompressedFileError: If it has fewer than two.

    """
    table = reader.take(reader.number(num_kinds))
    if np.count_nonzero(table) < 2:
        raise CompressedFileError("its table of frequencies has fewer than two symbols")
    return table


def read(reader: Reader, num_symbols: int, num_kinds: int) -> kernel.Code:
    """Read a code, and don't decode it.

    Args:
        reader: Stands where :func:`encode`'s bytes begin.
        num_symbols: How many there are.
        num_kinds: All symbols have to be below this.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    table = read_table(reader, num_kinds)
    words = reader.take(WORD_BYTES * reader.number(reader.num_left // WORD_BYTES)).view("<u4").astype(np.uint32)
    if len(words) and not words[-1]:
        raise CompressedFileError("its ANS code ends in an empty word")
    return kernel.Code(words, SHARES[table], num_symbols)


def decode(codes: Sequence[kernel.Code]) -> list[Callable[[], Symbols]]:
    """Decode symbols of several codes, side by side where there are compiled kernels.

    Args:
        codes: The codes.

    Returns:
        What returns the symbols of each, or raises :class:`CompressedFileError` if they aren't those of :func:`encode`.

    """
    decoded = kernel.decode(codes) if native.serves() else [_decode(code) for code in codes]
    return [partial(_checked, *result) for result in decoded]


def _decode(code: kernel.Code) -> tuple[Symbols, bool]:
    coder = constriction.stream.stack.AnsCoder(code.words)
    model = constriction.stream.model.Categorical(code.shares, perfect=False)
    return coder.decode(model, code.num_symbols).astype(np.uint16), coder.is_empty()


def _checked(symbols: Symbols, is_whole: bool) -> Symbols:
    # The coder ends in the state in which encoding began, or these are not the symbols that were encoded. So a library
    # that rounded a model otherwise would be noticed, too.
    if not is_whole:
        raise CompressedFileError("its ANS code doesn't end where its symbols do")
    return symbols
