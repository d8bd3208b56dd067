"""Interleaved codes, as which files have long streams; decoded in numpy where nothing else is there."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from squall.kernels import native

SHARE_BITS, NUM_STATES = 12, 64  # as in interleaved.c
WORD_BITS = 16
WHOLE = 1 << SHARE_BITS
"""What the frequencies of a model add up to."""
MAX_KINDS = 256
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_decode = native.function(
    "squall_interleaved_decode", _POINTER, _LONG, *[_POINTER] * 3, _LONG, returns=ctypes.c_int
)  # fmt: skip
_encode = native.function("squall_interleaved_encode", _POINTER, _LONG, *[_POINTER] * 4, returns=_LONG)

Bytes = npt.NDArray[np.uint8]


class Interleaved(NamedTuple):
    """Symbols that many states of asymmetric numeral systems have coded by turns, and written to one row of words.

    Symbol number i is the business of state i modulo 64. It is looked up by the lowest 12 bits of the state; these
    become where in the symbol's share they were, and the others are multiplied by how large it is. A state that is then
    below 2^16 takes the next word in. At last all states are 2^16, where encoding began, and no words are left.

    Args:
        words: uint16.
        states: uint32, 64 of them: as decoding begins.
        frequencies: uint16: of each symbol, one after the other; they add up to 2^12, and none is as much.
        num_symbols: How many to decode.

    """

    words: npt.NDArray[np.uint16]
    states: npt.NDArray[np.uint32]
    frequencies: npt.NDArray[np.uint16]
    num_symbols: int


def decode_interleaved(code: Interleaved) -> tuple[Bytes, bool]:
    """Decode a code.

    Args:
        code: Of 2 to 256 symbols in the model.

    Returns:
        Its symbols, and whether it ends where they do.

    """
    if not native.serves():
        return _decode_in_turns(code)
    symbols = np.empty(code.num_symbols, np.uint8)
    words, states, frequencies = map(np.ascontiguousarray, code[:3])
    is_whole = _decode(
        words.ctypes.data, len(words), states.ctypes.data, frequencies.ctypes.data, symbols.ctypes.data, len(symbols)
    )
    return symbols, bool(is_whole)


def _decode_in_turns(code: Interleaved) -> tuple[Bytes, bool]:
    symbols, states = np.empty(code.num_symbols, np.uint8), code.states.copy()
    kinds = np.repeat(np.arange(len(code.frequencies)), code.frequencies).astype(np.uint8)
    shares = code.frequencies.astype(np.uint32)[kinds]
    places = np.arange(WHOLE, dtype=np.uint32) - (np.cumsum(code.frequencies, dtype=np.uint32))[kinds] + shares
    num_taken = 0
    for begin in range(0, code.num_symbols, NUM_STATES):
        turn = states[: code.num_symbols - begin]  # a view; all of them, but for the last turn
        low = turn & (WHOLE - 1)
        symbols[begin : begin + NUM_STATES] = kinds[low]
        turn[:] = shares[low] * (turn >> SHARE_BITS) + places[low]
        refills = np.flatnonzero(turn < 1 << WORD_BITS)
        words = code.words[num_taken : num_taken + len(refills)]
        num_taken += len(words)
        refills = refills[: len(words)]
        turn[refills] = turn[refills] << WORD_BITS | words
    return symbols, num_taken == len(code.words) and bool((states == 1 << WORD_BITS).all())


def encode_interleaved(symbols: npt.NDArray[np.int32], frequencies: npt.NDArray[np.uint16]) -> Interleaved:
    """Code symbols; by the compiled kernel alone.

    Args:
        symbols: All below 256.
        frequencies: Of the model. None of the symbols has 0.

    Returns:
        The code.

    """
    symbols, frequencies = np.ascontiguousarray(symbols, np.int32), np.ascontiguousarray(frequencies, np.uint16)
    starts = (np.cumsum(frequencies) - frequencies).astype(np.uint16)
    words, states = np.empty(len(symbols), np.uint16), np.empty(NUM_STATES, np.uint32)
    num_words = _encode(
        symbols.ctypes.data, len(symbols), frequencies.ctypes.data, starts.ctypes.data, states.ctypes.data,
        words.ctypes.data,
    )  # fmt: skip
    return Interleaved(words[len(words) - num_words :].copy(), states, frequencies, len(symbols))
