"""The ways there are to store a tensor, and what each takes; sizes are known before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from squall.kernels import ans as kernel
from squall.kernels import native

from . import positions, streams
from .fields import number

SPARSE, SHARED, COLUMNS = 1, 2, 4
"""Flags of a layout: only what isn't zero is stored; values are codes; positions run along columns."""
MAX_VALUES = 1 << 16
"""A codebook with more values than this has never been worth while."""
_SAMPLE = 4 * MAX_VALUES

Words = npt.NDArray[Any]
"""A tensor's elements as unsigned integers, in one dimension."""
Counted = tuple[Words, npt.NDArray[np.int64]]
"""The values there are, in ascending order of their bits, and how often each."""


class Way(NamedTuple):
    """A way to store a tensor.

    Args:
        num_bytes: What that takes, to within a word or two.
        num_symbols: What has to be decoded.
        effort: What that takes.
        layout: Its flags.
        encode: Makes the bytes of the positions, of the codebook, and of the codes or values.

    """

    num_bytes: float
    num_symbols: int
    effort: float
    layout: int
    encode: Callable[[], tuple[bytes, bytes, bytes]]


def ways_of(
    words: Words,
    places: positions.Positions,
    counted: Counted | None,
    shape: tuple[int, ...],
    coder: streams.Coder,
    gap_bits: int | None,
) -> list[Way]:
    """List the ways to store a tensor: sparse or dense, with a codebook or without; but for the tensor as it is.

    Args:
        words: Its elements.
        places: Where they aren't zero.
        counted: What :func:`count_values` says of the others.
        shape: Its shape.
        coder: "ans" or "huffman".
        gap_bits: Bits of a distance between weights before it is coded; None: those that take the fewest bytes.

    Returns:
        At least one way.

    """
    order, columns, where = _order(places, shape, coder, gap_bits)

    def indices() -> bytes:
        return number(len(places)) + positions.encode(order(), where)

    def values() -> Words:
        return words[to_rows(order(), shape) if columns else places]

    num_index_bytes = len(number(len(places))) + where.num_bytes
    plain = Way(
        num_index_bytes + len(places) * words.itemsize,
        where.num_symbols,
        where.effort,
        SPARSE | columns,
        lambda: (indices(), b"", _little(values())),
    )
    if counted is None:
        return [plain]
    codebook, counts = counted
    stream = _plan_codes(counts, coder)
    sparse = Way(
        num_index_bytes + _size(codebook) + stream.num_bytes,
        where.num_symbols + len(places) * (len(codebook) > 1),
        where.effort + len(places) * stream.effort * (len(codebook) > 1),
        SPARSE | SHARED | columns,
        lambda: (indices(), _little_codebook(codebook), stream.encode(_codes(values(), codebook))),
    )
    if len(places) < words.size:
        codebook_of_all = np.insert(codebook, 0, 0)
        counts_of_all = np.insert(counts, 0, words.size - len(places))
    else:
        codebook_of_all, counts_of_all = codebook, counts
    stream_of_all = _plan_codes(counts_of_all, coder)
    dense = Way(
        _size(codebook_of_all) + stream_of_all.num_bytes,
        words.size * (len(codebook_of_all) > 1),
        words.size * stream_of_all.effort * (len(codebook_of_all) > 1),
        SHARED,
        lambda: (b"", _little_codebook(codebook_of_all), stream_of_all.encode(_codes(words, codebook_of_all))),
    )
    return [plain, sparse, dense]


def _plan_codes(counts: npt.NDArray[np.int64], coder: streams.Coder) -> streams.Stream:
    return streams.plan(counts if len(counts) > 1 else counts[:0], coder)  # one value needs no codes


def _order(
    places: positions.Positions, shape: tuple[int, ...], coder: streams.Coder, gap_bits: int | None
) -> tuple[Callable[[], positions.Positions], int, positions.PositionPlan]:
    """Positions in the better order, the flag of that order, and how they are coded."""
    where = positions.plan(places, coder, gap_bits)
    if len(shape) > 1 and len(places):
        rows, columns = shape[0], math.prod(shape[1:])
        turned = np.sort(places % columns * rows + places // columns)
        where_turned = positions.plan(turned, coder, gap_bits)
        if streams.TOLERANCE * where_turned.num_bytes < where.num_bytes:  # rows are filled in order, and sooner
            return lambda: turned, COLUMNS, where_turned
    return lambda: places, 0, where


def to_rows(turned: positions.Positions, shape: tuple[int, ...]) -> positions.Positions:
    """Turn positions along columns into positions along rows, one for one.

    Args:
        turned: Positions along columns.
        shape: Of the tensor; all dimensions but the first make a column's index.

    Returns:
        The positions of the same elements along rows.

    """
    rows, columns = shape[0], math.prod(shape[1:])
    along_rows: positions.Positions = turned % rows * columns + turned // rows
    return along_rows


def along_rows(
    turned: positions.Positions, stored: npt.NDArray[Any], shape: tuple[int, ...]
) -> tuple[positions.Positions, npt.NDArray[Any]]:
    """Bring elements along columns into the order of rows.

    Args:
        turned: Their positions along columns, ascending, at least one.
        stored: A number of each.
        shape: Of the tensor.

    Returns:
        The positions along rows, ascending, and the numbers in their order.

    """
    if native.serves():
        return kernel.turn(turned, stored, shape[0], math.prod(shape[1:]))
    places = to_rows(turned, shape)
    order = np.argsort(places)
    return places[order], stored[order]


def count_values(values: Words) -> Counted | None:
    """Count the values there are.

    Args:
        values: The values.

    Returns:
        Each of them, and how often; None if they are too many to share.

    """
    if values.itemsize > 2 and len(np.unique(values[:_SAMPLE])) > MAX_VALUES:
        return None
    codebook, counts = np.unique(values, return_counts=True)
    return (codebook, counts) if len(codebook) <= MAX_VALUES else None


def _size(codebook: Words) -> int:
    return len(number(len(codebook))) + codebook.nbytes


def _little_codebook(codebook: Words) -> bytes:
    return number(len(codebook)) + _little(codebook)


def _codes(values: Words, codebook: Words) -> streams.Symbols:
    return np.searchsorted(codebook, values).astype(np.int32)


def _little(words: Words) -> bytes:
    return words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()
