"""Named shared memory: what a process killed with ``kill -9`` leaves to its successor, and bytes that nobody copies."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

try:  # the standard library's own, without its tracker: that one unlinks what a killed process has left
    import _posixshmem
except ImportError:  # pragma: no cover  (Windows)
    _posixshmem = None  # type: ignore[assignment]

ALIGNMENT = 64  # bytes: a cache line, and what torch's vectorized loops like


def aligned(num_bytes: int) -> int:
    """Round up to the alignment of everything in a segment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def host_prefix(run: str, node: int) -> str:
    """What names of shared memory on a host begin with: hosts may share one kernel, as in network namespaces."""
    return f"{run}.n{node}" if node else run


class Segment:
    """A piece of shared memory with a name, readable by this user only.

    The mapping lives as long as a tensor on it does; the name lives until :meth:`unlink`.

    Args:
        name: Letters, digits and ``-``.
        num_bytes: Size, to create it; 0 to attach to an existing one.

    Raises:
        FileNotFoundError: If there is none of that name to attach to.
        FileExistsError: If there is one already, to be created.
        MisconfigurationException: If the host has too little shared memory.

    """

    def __init__(self, name: str, num_bytes: int = 0) -> None:
        if _posixshmem is None:  # pragma: no cover
            raise MisconfigurationException("This platform has no POSIX shared memory, which the shards live in.")
        self.name = name
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if num_bytes else 0)
        descriptor = _posixshmem.shm_open("/" + name, flags, mode=0o600)
        try:
            if num_bytes:
                _reserve(descriptor, name, num_bytes)
            self.num_bytes = os.fstat(descriptor).st_size
            self._map = mmap.mmap(descriptor, self.num_bytes)
        finally:
            os.close(descriptor)

    def tensor(self, dtype: torch.dtype, offset: int, num_elements: int) -> Tensor:
        """A flat tensor on the segment's memory.

        Args:
            dtype: Of the elements.
            offset: Where it starts, in bytes.
            num_elements: Its length.

        """
        if num_elements == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=num_elements, offset=offset)

    @staticmethod
    def unlink(name: str) -> None:
        """Take the name away; those who are attached stay so."""
        with contextlib.suppress(FileNotFoundError):
            _posixshmem.shm_unlink("/" + name)


def make_or_attach(name: str, num_bytes: int) -> Segment:
    """A segment of a name that an attempt before this one may have made."""
    try:
        return Segment(name, num_bytes)
    except FileExistsError:
        return Segment(name)


def _reserve(descriptor: int, name: str, num_bytes: int) -> None:
    try:
        os.ftruncate(descriptor, num_bytes)
        if hasattr(os, "posix_fallocate"):  # a full file system is an error now, and not SIGBUS later
            os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        Segment.unlink(name)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise MisconfigurationException(
            f"The shards need {num_bytes / 2**20:.0f} MiB more of shared memory than this host has left"
            " (`df -h /dev/shm`). In a container, start it with a larger --shm-size."
        ) from None
