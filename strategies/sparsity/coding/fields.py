"""Numbers and bytes one behind another, as they lie in a coded tensor; and read again without belief in any of them.

A number is a LEB128: seven bits a byte, the lowest first, the eighth says that more follow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import CompressedFileError

Bytes = npt.NDArray[np.uint8]

_MAX_NUMBER_BYTES = 9
"""Of 7 bits each: no number reaches 2^63, so none overflows an int64."""


def number(value: int) -> bytes:
    """Write a number that isn't negative.

    Args:
        value: The number, below 2^63.

    Returns:
        One to nine bytes.

    Example:
        >>> number(300).hex()
        'ac02'

    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


MAX_SYMBOLS_PER_BYTE = 16
"""All streams of a file together have this many symbols a byte at most, or a small bad file could keep a reader busy
for long. A writer sees to it."""
FREE_SYMBOLS = 1 << 20
"""So many symbols a file may have however small it is."""


class Budget:
    """How many symbols may still be decoded.

    Args:
        num_bytes: Of the file, which all its streams have one budget for.

    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._num_left = FREE_SYMBOLS + MAX_SYMBOLS_PER_BYTE * num_bytes

    def spend(self, num_symbols: int) -> None:
        """Take symbols off, before anything of their number is allocated.

        Args:
            num_symbols: How many are announced.

        Raises:
            CompressedFileError: If so many can't be.

        """
        if num_symbols > self._num_left:
            raise CompressedFileError(
                f"{num_symbols:,} symbols are announced, and {self._num_bytes:,} bytes may have {self._num_left:,} more"
            )
        self._num_left -= num_symbols


class Reader:
    """What is left to read of some bytes.

    Args:
        data: The bytes.
        budget: The file's; None: one for these bytes alone.

    """

    def __init__(self, data: Bytes, budget: Budget | None = None) -> None:
        self._data = data
        self._at = 0
        self.budget = Budget(len(data)) if budget is None else budget

    @property
    def num_left(self) -> int:
        """Bytes that are still to be read."""
        return len(self._data) - self._at

    def take(self, num_bytes: int) -> Bytes:
        """Read bytes.

        Args:
            num_bytes: How many.

        Returns:
            A view of them.

        Raises:
            CompressedFileError: If there are fewer.

        """
        if num_bytes > self.num_left:
            raise CompressedFileError(f"{num_bytes:,} more bytes are announced and {self.num_left:,} are there")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def number(self, limit: int) -> int:
        """Read a number.

        Args:
            limit: The largest that makes sense here.

        Returns:
            The number, from 0 to `limit`.

        Raises:
            CompressedFileError: If it doesn't end, or is larger.

        """
        value = 0
        for position in range(_MAX_NUMBER_BYTES):
            byte = int(self.take(1)[0])
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                break
        else:
            raise CompressedFileError("a number doesn't end")
        if value > limit:
            raise CompressedFileError(f"it says {value:,} where at most {limit:,} can be")
        return value

    def end(self) -> None:
        """Make sure that everything has been read.

        Raises:
            CompressedFileError: If something is left.

        """
        if self.num_left:
            raise CompressedFileError(f"{self.num_left:,} bytes are left over")
