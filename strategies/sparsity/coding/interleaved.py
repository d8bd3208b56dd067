"""Interleaved asymmetric numeral systems, for long streams: within a per cent of :mod:`.ans`, many times as fast.

One state can't go on before it knows where it is, so a stream that a single one has coded takes as long as that. Here
64 of them take turns (Giesen 2014, "Interleaved entropy coders"), and the model is coarse enough to be looked up. The
table is that of :mod:`.ans`, a byte a symbol; what it makes of a share is 12 bits of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from squall.kernels import ans as kernel
from squall.kernels import native
from squall.kernels.ans.interleaved import MAX_KINDS, NUM_STATES, WHOLE, WORD_BITS

from . import ans
from .errors import CompressedFileError
from .fields import Bytes, Reader, number

TOLERANCE = 1.01
"""What takes so many times the bytes of :mod:`.ans` is worth it: it is decoded in a fraction of the time."""
_STATE_BYTES, _WORD_BYTES = 4, 2

Frequencies = npt.NDArray[np.uint16]


def _frequencies(table: Bytes) -> Frequencies | None:
    """What the table's shares are of 2^12; None if that is too little for so many symbols."""
    shares = ans.SHARES[table].astype(np.int64)
    rounded = (2 * shares * WHOLE + shares.sum()) // (2 * shares.sum())
    frequencies = np.where(shares > 0, np.maximum(rounded, 1), 0)
    largest = int(frequencies.argmax())
    frequencies[largest] += WHOLE - frequencies.sum()
    return frequencies.astype(np.uint16) if 0 < frequencies[largest] < WHOLE else None


def size(counts: npt.NDArray[np.int64]) -> float:
    """Say how many bytes a stream takes.

    Args:
        counts: How often each symbol occurs; at least two of them do.

    Returns:
        The number of bytes, to within a few words; infinitely many if they are too many symbols, or nothing is there
        to encode them with.

    """
    table = ans.table_of(counts)
    frequencies = _frequencies(table) if len(table) <= MAX_KINDS and native.serves() else None
    if frequencies is None:
        return np.inf
    present = counts > 0
    bits = float((counts[present] * np.log2(WHOLE / frequencies[present[: len(table)]])).sum())
    # A state that begins as 2^16 ends somewhere below 2^32: about half of what it takes is worth something.
    words = max(0.0, bits / WORD_BITS - NUM_STATES / 2)
    return len(number(len(table))) + len(table) + _STATE_BYTES * NUM_STATES + len(number(int(words))) + 2 * words


def encode(symbols: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> bytes:
    """Code symbols.

    Args:
        symbols: The symbols.
        counts: How often each of them occurs. :func:`size` isn't infinite.

    Returns:
        The model and the code.

    """
    table = ans.table_of(counts)
    frequencies = _frequencies(table)
    assert frequencies is not None
    code = kernel.encode_interleaved(symbols, frequencies)
    states, words = code.states.astype("<u4").tobytes(), code.words.astype("<u2").tobytes()
    return number(len(table)) + table.tobytes() + states + number(len(code.words)) + words


def read(reader: Reader, num_symbols: int, num_kinds: int) -> kernel.Interleaved:
    """Read a code, and don't decode it.

    Args:
        reader: Stands where :func:`encode`'s bytes begin.
        num_symbols: How many there are.
        num_kinds: All symbols have to be below this.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    table = ans.read_table(reader, min(num_kinds, MAX_KINDS))
    frequencies = _frequencies(table)
    if frequencies is None:
        raise CompressedFileError("its table of frequencies has too many symbols")
    states = reader.take(_STATE_BYTES * NUM_STATES).view("<u4").astype(np.uint32)
    words = reader.take(_WORD_BYTES * reader.number(reader.num_left // _WORD_BYTES)).view("<u2")
    return kernel.Interleaved(words.astype(np.uint16, copy=False), states, frequencies, num_symbols)


def decode(code: kernel.Interleaved) -> npt.NDArray[np.uint8]:
    """Decode symbols.

    Args:
        code: The code.

    Raises:
        CompressedFileError: If they aren't those of :func:`encode`.

    """
    symbols, is_whole = kernel.decode_interleaved(code)
    if not is_whole:
        raise CompressedFileError("its ANS code doesn't end where its symbols do")
    return symbols
