"""What happened in a run, in its order: a few bits an event for the coordinator, pairs for its user."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

KINDS = (
    "lease", "end", "commit", "fetch", "lost",  # what makes an update, and from which weights
    "snapshot", "buffers", "share", "write", "return", "leave",  # what the user's code may make something of
)  # fmt: skip
_CODES = {kind: code for code, kind in enumerate(KINDS)}
MAX_RANK = 1 << 20
_CHUNK = 1 << 16  # events that are compressed together


def to_code(kind: str, rank: int) -> int:
    """An event as one number."""
    return _CODES[kind] + len(KINDS) * rank


def from_code(code: int) -> tuple[str, int]:
    """The kind and the rank of an event."""
    rank, kind = divmod(code, len(KINDS))
    return KINDS[kind], rank


class EventLog:
    """All events of a run so far. Ranks take turns, so a run of days compresses to megabytes.

    Example:
        >>> log = EventLog()
        >>> log.append(to_code("lease", 1))
        >>> unpack(log.packed()).tolist() == [to_code("lease", 1)]
        True

    """

    def __init__(self) -> None:
        self._stream = zlib.compressobj(1)
        self._packed = bytearray()
        self._recent = array("I")

    def append(self, code: int) -> None:
        """Note an event."""
        self._recent.append(code)
        if len(self._recent) == _CHUNK:
            self._packed += self._stream.compress(self._recent.tobytes())
            self._recent = array("I")

    def packed(self) -> bytes:
        """All of them, for :func:`unpack`; others may follow."""
        rest = self._stream.copy()
        return bytes(self._packed) + rest.compress(self._recent.tobytes()) + rest.flush()


def pack(codes: array[int]) -> bytes:
    """Events, for :func:`unpack`."""
    return zlib.compress(codes.tobytes(), 1)


def unpack(data: bytes | bytearray) -> array[int]:
    """The events that :class:`EventLog` or :func:`pack` has packed."""
    codes = array("I")
    if data:
        codes.frombytes(zlib.decompress(data))
    return codes


def num_ranks(codes: array[int]) -> int:
    """How many ranks a run must have for these to happen in it."""
    return 1 + max(codes, default=-1) // len(KINDS)


def to_pairs(codes: Iterable[int]) -> list[list[Any]]:
    """Events as ``[kind, rank]``."""
    return [list(from_code(code)) for code in codes]


def from_pairs(pairs: Any) -> array[int]:
    """Events from ``[kind, rank]``.

    Raises:
        ValueError: These are no events; says which is the first, and why.

    """
    if not isinstance(pairs, Sequence) or isinstance(pairs, (str, bytes)):
        raise ValueError("it is no list")
    codes = array("I")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise ValueError(f"event {number} is {pair!r}, and not [kind, rank]")
        kind, rank = pair
        if not isinstance(kind, str) or kind not in _CODES:
            raise ValueError(f"event {number} is of kind {kind!r}, which is none of {', '.join(KINDS)}")
        if type(rank) is not int or not 0 <= rank < MAX_RANK:
            raise ValueError(f"event {number} is of rank {rank!r}, which is no rank")
        codes.append(to_code(kind, rank))
    return codes
