"""A stream: symbols 0, 1, 2 … in the fewest bytes that a coder makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from squall.kernels.ans import Code

from . import ans, huffman, interleaved
from .errors import CompressedFileError
from .fields import Reader, number

Coder = Literal["ans", "huffman"]
CODERS: tuple[Coder, ...] = get_args(Coder)

_SYMBOLS_PER_BYTE = 64
"""A stream has this many symbols a byte at most. What all streams of a file may have is less: see `fields.Budget`."""
_FREE_SYMBOLS = 4096
"""So many symbols may take no bytes at all, as those of a stream of one symbol do."""
TOLERANCE = 1.002
"""What takes so many times the bytes is worth it if it is decoded sooner."""
_CONSTANT, _ANS, _HUFFMAN, _INTERLEAVED = range(4)
_KIND = {"ans": _ANS, "huffman": _HUFFMAN}

Symbols = npt.NDArray[np.int32]
Decoded = npt.NDArray[Any]
"""uint8 or uint16."""
_Counts = npt.NDArray[np.int64]


class Stream(NamedTuple):
    """How symbols are best coded.

    Args:
        num_bytes: What that takes, all included; to within a word or two.
        encode: Turns the symbols into the bytes.
        effort: What a symbol takes to decode, in those of the fastest coder.

    """

    num_bytes: float
    encode: Callable[[Symbols], bytes]
    effort: float = 8.0


class Sized(Protocol):
    """A way to store something."""

    @property
    def num_bytes(self) -> float:
        """What it takes."""

    @property
    def effort(self) -> float:
        """What it takes to decode."""


_Sized = TypeVar("_Sized", bound=Sized)


def smallest(ways: Sequence[_Sized]) -> _Sized:
    """Choose the way that takes the fewest bytes, and of those that are as good as equal the fastest to decode.

    Args:
        ways: At least one.

    Returns:
        Of the ways within 0.2 % of the smallest the one with the least effort.

    """
    limit = TOLERANCE * min(way.num_bytes for way in ways)
    return min((way for way in ways if way.num_bytes <= limit), key=lambda way: (way.effort, way.num_bytes))


def plan(counts: _Counts, coder: Coder) -> Stream:
    """Choose how to code symbols.

    Args:
        counts: How often each of them occurs.
        coder: "ans" or "huffman". Where only one symbol occurs, that is all that is written.

    Returns:
        What it takes, and how; infinitely much if the coder can't, or a reader would refuse it.

    """
    counts = np.asarray(counts, np.int64)
    present = np.flatnonzero(counts)
    if not len(present):
        return Stream(0, lambda symbols: b"")
    codes = huffman if coder == "huffman" else ans
    if len(present) > codes.MAX_KINDS:
        return Stream(np.inf, _impossible)
    if len(present) == 1:
        constant = bytes([_CONSTANT]) + number(int(present[0]))
        stream = Stream(len(constant), lambda symbols: constant, effort=0.1)
    else:
        stream = Stream(1 + codes.size(counts), lambda symbols: bytes([_KIND[coder]]) + codes.encode(symbols, counts))
        fast = 1 + interleaved.size(counts) if coder == "ans" else np.inf
        if fast <= interleaved.TOLERANCE * stream.num_bytes:
            stream = Stream(
                fast, lambda symbols: bytes([_INTERLEAVED]) + interleaved.encode(symbols, counts), effort=1.0
            )  # fmt: skip
    refused = counts.sum() > _most_symbols(max(0, int(stream.num_bytes) - 1 - 2 * ans.WORD_BYTES))
    return Stream(np.inf, _impossible) if refused else stream


def _impossible(symbols: Symbols) -> bytes:
    raise AssertionError("a stream that nobody would read")


def _most_symbols(num_bytes: int) -> int:
    return _FREE_SYMBOLS + _SYMBOLS_PER_BYTE * num_bytes


class Coded:
    """A stream that has been read, and is still to be decoded.

    Args:
        decode: What does so.
        code: Or a code, which is sooner decoded together with others.

    """

    def __init__(self, decode: Callable[[], Decoded] | None = None, code: Code | None = None) -> None:
        self._decode, self._code = decode, code

    def symbols(self) -> Decoded:
        """Decode; once, as the stream is let go of.

        Raises:
            CompressedFileError: If the bytes are no stream of so many symbols.

        """
        decode_together([self])
        decode, self._decode = self._decode, None
        assert decode is not None
        return decode()


def decode_together(coded: Sequence[Coded]) -> None:
    """Decode streams ahead, side by side: each by itself is waiting for its own arithmetic most of the time.

    Args:
        coded: Any. What is wrong with one is said when its symbols are asked for.

    """
    waiting = [(stream, stream._code) for stream in coded if stream._code is not None]
    if not waiting:
        return
    for (stream, _), decode in zip(waiting, ans.decode([code for _, code in waiting]), strict=True):
        stream._decode, stream._code = decode, None


def read(reader: Reader, num_symbols: int, num_kinds: int) -> Coded:
    """Read a stream, and don't decode it.

    Args:
        reader: Stands where the stream begins.
        num_symbols: How many there are.
        num_kinds: All symbols have to be below this.

    Raises:
        CompressedFileError: If the bytes are no stream of so many symbols.

    """
    if not num_symbols:
        return Coded(lambda: np.empty(0, np.uint16))
    kind = reader.number(_INTERLEAVED)
    if num_symbols > _most_symbols(0 if kind == _CONSTANT else reader.num_left):
        raise CompressedFileError(f"{num_symbols:,} symbols are announced in {reader.num_left:,} bytes")
    reader.budget.spend(num_symbols)
    if kind == _CONSTANT:
        symbol = reader.number(num_kinds - 1)
        return Coded(lambda: np.full(num_symbols, symbol, np.uint16))
    if kind == _HUFFMAN:
        return Coded(huffman.read(reader, num_symbols, num_kinds))
    if kind == _INTERLEAVED:
        return Coded(partial(interleaved.decode, interleaved.read(reader, num_symbols, num_kinds)))
    return Coded(code=ans.read(reader, num_symbols, num_kinds))
