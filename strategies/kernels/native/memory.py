"""Memory of the CPU that is kept: pages that the system has to give anew can cost more than the work.

An allocator that returns every large block to the system, as that of the C library does, has each result of tens of
megabytes begin with thousands of page faults. Here such blocks are in large pages, where the system has any, and wait
for the next result. All of it is the CPU's, whatever the default device.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20
"""Smaller results are Torch's business: memory for them is found again as it is."""
_MOST_KEPT = 256 << 20
_MOST_TIMES = 4  # as large as what is asked for
_LONG_AGO = 256  # results: what hasn't been asked for since isn't part of what is being run
_PAGE = mmap.PAGESIZE


class _Kept(NamedTuple):
    """Memory that nobody uses.

    Args:
        array: What it is.
        since: How many had come back before.

    """

    array: Any
    since: int


_lock = threading.RLock()  # blocks come back whenever a tensor is gone, in here as well
_kept: list[_Kept] = []  # the longest kept one first
_count = itertools.count()  # of what has come back
_own = threading.local()


def workspace(num: int, name: str) -> Tensor:
    """Memory for intermediate results: the calling thread's own, and kept.

    Args:
        num: Single-precision numbers.
        name: What for; two of one name are the same memory.

    Returns:
        Shape (num,), uninitialised.

    """
    if 4 * num > _MOST_KEPT:
        return in_large_pages(torch.empty(num, dtype=torch.float32, device="cpu"))
    kept = getattr(_own, name, None)
    if kept is None or kept.shape[0] < num:
        with torch.inference_mode(False):  # it may be written to outside of it later
            kept = in_large_pages(torch.empty(num, dtype=torch.float32, device="cpu"))
        setattr(_own, name, kept)
    own: Tensor = kept[:num]
    return own


def result(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Get memory of the CPU for a result.

    Args:
        shape: The result's.
        dtype: Likewise.

    Returns:
        Contiguous and uninitialised. When nothing refers to its memory any more, another result may have it.

    Example:
        >>> result((2, 3)).shape
        torch.Size([2, 3])

    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LEAST_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    memory = _take(num_bytes)
    if memory is None:
        memory = in_large_pages(torch.empty(num_bytes, dtype=torch.uint8, device="cpu")).numpy()
    lent = memory[:num_bytes]  # an array of its own: it is gone when the last tensor of this memory is
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(tuple(shape))


def result_like(x: Tensor) -> Tensor:
    """Get memory for a result of the shape, dtype and memory format of a tensor.

    Args:
        x: Contiguous, or so as channels_last.

    """
    return result((x.numel(),), x.dtype).as_strided(x.shape, x.stride())


def let_freed_blocks_stay() -> None:
    """Have the C library's allocator keep what Torch frees, up to 62 MB: twice the largest block that it has got back.

    It would get there by itself, or not, by what was run before. Others than that of glibc take no notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")  # it learns from no block above 32 MB


def _take(num_bytes: int) -> Any:
    """Find the smallest block that is large enough, and not much too large; None if there is none."""
    with _lock:
        fitting = [kept for kept in _kept if num_bytes <= kept.array.nbytes <= _MOST_TIMES * num_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda kept: kept.array.nbytes)
        _forget(best)
        return best.array


def _give_back(array: Any) -> None:
    """Keep a block. If that is too much, what nobody has needed for long goes, or else what is least work to have anew.

    The longest kept one would be the wrong choice: a network that needs a little more than is kept would find nothing.
    """
    if array.nbytes > _MOST_KEPT:
        return
    with _lock:
        now = next(_count)
        _kept.append(_Kept(array, now))
        while True:
            blocks = list(_kept)
            if sum(kept.array.nbytes for kept in blocks) <= _MOST_KEPT:
                break
            is_old = now - blocks[0].since > _LONG_AGO
            _forget(blocks[0] if is_old else min(blocks, key=lambda kept: kept.array.nbytes))


def _forget(gone: _Kept) -> None:
    _kept[:] = [kept for kept in _kept if kept is not gone]  # arrays can't be compared


def _find_advise() -> Any:
    """Find ``madvise``; None where it knows no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


_advise = _find_advise()


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask the system for large pages behind a new tensor; where it has none, nothing happens.

    Args:
        tensor: Of the CPU; nothing of it has been written yet.

    Returns:
        The same tensor.

    """
    begin, end = -(-tensor.data_ptr() // _PAGE) * _PAGE, (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if _advise is not None and end - begin >= LEAST_BYTES:
        _advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return tensor
