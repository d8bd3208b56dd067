"""Canonical Huffman codes, as in Deep Compression (Han et al. 2016, section 4), coded and decoded by whole arrays.

Symbols are dealt out to lanes, one each in turn, and each lane's code is a run of bits of its own; so all lanes can be
decoded side by side, one table look-up a symbol. A lane costs the two bytes that say where it ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .errors import CompressedFileError
from .fields import Bytes, Reader, number

MAX_LENGTH = 15
"""Bits of the longest code: a length fits half a byte, and the table of all continuations fits a cache."""
MAX_KINDS = 1 << 14
"""More symbols than this don't get codes of 15 bits that are worth while."""
_LANE_SYMBOLS = 1024
_WINDOW_BITS = 24
"""Three bytes, so that the longest code is whole in them wherever in the first it begins."""
_SHIFT = 1 << np.arange(MAX_LENGTH + 1)

_Counts = npt.NDArray[np.int64]


def code_lengths(counts: _Counts) -> npt.NDArray[np.int64]:
    """Find the best prefix code whose lengths are limited: package-merge (Larmore and Hirschberg 1990).

    Args:
        counts: How often each symbol occurs; from 2 to `MAX_KINDS` of them do.

    Returns:
        Bits of each symbol's code, 0 for one that doesn't occur.

    Example:
        >>> code_lengths(np.array([5, 0, 1, 2])).tolist()
        [1, 0, 2, 2]

    """
    symbols = np.flatnonzero(counts)
    symbols = symbols[np.argsort(counts[symbols], kind="stable")]
    leaves = counts[symbols]
    levels, packages = [], leaves[:0]
    for _ in range(MAX_LENGTH):
        merged = np.concatenate((leaves, packages))
        order = np.argsort(merged, kind="stable")
        levels.append(order < len(leaves))
        merged = merged[order]
        packages = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
    lengths, num_taken = np.zeros(len(leaves), np.int64), 2 * len(leaves) - 2
    for is_leaf in reversed(levels):
        num_leaves = int(np.count_nonzero(is_leaf[:num_taken]))
        lengths[:num_leaves] += 1  # leaves are taken smallest first
        num_taken = 2 * (num_taken - num_leaves)
    result = np.zeros(len(counts), np.int64)
    result[symbols] = lengths
    return result


def _canonical(lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The symbols that have a code, shortest first, and where their codes begin among all of `MAX_LENGTH` bits."""
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    ends = np.cumsum(_SHIFT[MAX_LENGTH - lengths[symbols]])
    return symbols, ends - _SHIFT[MAX_LENGTH - lengths[symbols]]


def _pack_lengths(lengths: npt.NDArray[np.int64]) -> bytes:
    lengths = lengths[: int(np.flatnonzero(lengths)[-1]) + 1]
    pairs = np.zeros((len(lengths) + 1) // 2 * 2, np.uint8)
    pairs[: len(lengths)] = lengths
    return number(len(lengths)) + (pairs[::2] | pairs[1::2] << 4).tobytes()


def size(counts: _Counts) -> int:
    """Say how many bytes a stream takes.

    Args:
        counts: How often each symbol occurs; from 2 to `MAX_KINDS` of them do.

    Returns:
        The number of bytes.

    """
    lengths = code_lengths(counts)
    num_bits, num_symbols = int((lengths * counts).sum()), int(counts.sum())
    return len(_pack_lengths(lengths)) + 2 * _num_lanes(num_symbols) + (num_bits + 7) // 8


def _num_lanes(num_symbols: int) -> int:
    return -(-num_symbols // _LANE_SYMBOLS)


def encode(symbols: npt.NDArray[np.int32], counts: _Counts) -> bytes:
    """Code symbols.

    Args:
        symbols: The symbols.
        counts: How often each of them occurs; from 2 to `MAX_KINDS` of them do.

    Returns:
        The lengths of the codes, and of the lanes in bits, and the lanes.

    """
    lengths = code_lengths(counts)
    ordered, starts = _canonical(lengths)
    codes = np.zeros_like(lengths)
    codes[ordered] = starts >> MAX_LENGTH - lengths[ordered]

    num_lanes = _num_lanes(len(symbols))
    # A row a step, a column a lane; what fills up the last row has codes of no bits.
    steps = np.zeros((-(-len(symbols) // num_lanes), num_lanes), np.int32)
    steps.reshape(-1)[: len(symbols)] = symbols
    bits = lengths[steps].astype(np.uint8)
    bits.reshape(-1)[len(symbols) :] = 0
    lane_bits = bits.sum(0, dtype=np.int64)
    of_lanes, widths = steps.T.reshape(-1), bits.T.reshape(-1)
    ends = np.cumsum(widths, dtype=np.int64)
    # The code's last bit is bit `ends`, counted from the left: put it there in a window of two 32-bit words.
    values = np.where(widths > 0, codes[of_lanes], 0) << (-ends & 31)
    words = np.maximum(ends - 1, 0) >> 5
    total = np.bincount(words, values & 0xFFFFFFFF, minlength=int(words[-1]) + 1)
    above = np.bincount(np.maximum(words - 1, 0), values >> 32, minlength=len(total))
    packed = np.asarray(total + above, ">u4").tobytes()
    return _pack_lengths(lengths) + np.asarray(lane_bits, "<u2").tobytes() + packed[: (int(ends[-1]) + 7) // 8]


def _decoding_table(reader: Reader, num_kinds: int) -> npt.NDArray[np.int32]:
    """For each continuation of `MAX_LENGTH` bits the symbol it begins with, times 16, and the length of its code."""
    num_lengths = reader.number(min(num_kinds, MAX_KINDS))
    pairs = reader.take((num_lengths + 1) // 2)
    lengths = np.stack((pairs & 15, pairs >> 4), 1).reshape(-1)[:num_lengths].astype(np.int64)
    symbols, _ = _canonical(lengths)
    widths = _SHIFT[MAX_LENGTH - lengths[symbols]]
    # No bits without a symbol, and none with two: then every lane can be decoded, whatever is in it.
    if len(symbols) < 2 or widths.sum() != 1 << MAX_LENGTH:
        raise CompressedFileError("the lengths in its Huffman table are those of no complete code")
    return np.repeat(symbols << 4 | lengths[symbols], widths).astype(np.int32)


def read(reader: Reader, num_symbols: int, num_kinds: int) -> Callable[[], npt.NDArray[np.uint16]]:
    """Read a code, and don't decode it.

    Args:
        reader: Stands where :func:`encode`'s bytes begin.
        num_symbols: How many there are.
        num_kinds: All symbols have to be below this.

    Returns:
        What decodes the symbols, or raises :class:`CompressedFileError`.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    table = _decoding_table(reader, num_kinds)
    num_lanes = _num_lanes(num_symbols)
    lane_bits = reader.take(2 * num_lanes).view("<u2").astype(np.int64)
    packed = reader.take((int(lane_bits.sum()) + 7) // 8)
    return lambda: _decode(table, lane_bits, packed, num_symbols)


def _decode(
    table: npt.NDArray[np.int32], lane_bits: npt.NDArray[np.int64], packed: Bytes, num_symbols: int
) -> npt.NDArray[np.uint16]:
    num_lanes, ends, windows = len(lane_bits), np.cumsum(lane_bits), _windows(packed)
    places, symbols = ends - lane_bits, np.empty(num_symbols, np.uint16)
    scratch, entries = np.empty(num_lanes, np.int64), np.empty(num_lanes, np.int32)
    for begin in range(0, num_symbols, num_lanes):
        num_active = min(num_lanes, num_symbols - begin)  # of the last row only the first lanes have a symbol
        at, spare, entry = places[:num_active], scratch[:num_active], entries[:num_active]
        np.right_shift(at, 3, out=spare)
        windows.take(spare, out=entry, mode="clip")  # a lane of a bad file may run past the end
        np.bitwise_and(at, 7, out=spare)
        np.subtract(_WINDOW_BITS - MAX_LENGTH, spare, out=spare)
        np.right_shift(entry, spare, out=spare)
        np.bitwise_and(spare, (1 << MAX_LENGTH) - 1, out=spare)
        table.take(spare, out=entry, mode="clip")
        np.right_shift(entry, 4, out=symbols[begin : begin + num_active], casting="unsafe")
        np.bitwise_and(entry, 15, out=entry)
        np.add(at, entry, out=at)
    if not np.array_equal(places, ends):
        raise CompressedFileError("its Huffman code doesn't end where its symbols do")
    return symbols


def _windows(packed: Bytes) -> npt.NDArray[np.int32]:
    """The `_WINDOW_BITS` bits that begin with each byte."""
    padded = np.zeros(len(packed) + 3, np.int32)
    padded[: len(packed)] = packed
    return padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
