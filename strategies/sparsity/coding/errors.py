"""The one error of a compressed file that can't be read."""

from __future__ import annotations


class CompressedFileError(ValueError):
    """A compressed file is damaged, of another version, or never was one; the message says what and which tensor."""
