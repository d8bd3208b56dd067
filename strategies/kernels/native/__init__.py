"""The library of compiled kernels: where it is, what it was built for, and how to call it.

It is plain C on raw pointers, so that one wheel serves any torch, and it is optional: without a compiler installation
succeeds, Torch operations serve, and :func:`squall.kernels.available` tells. One binary has every kernel for AVX-512,
AVX2 and neither; the best that the machine has is chosen when the library is loaded, and ``SQUALL_ISA`` (``plain``,
``avx2``, ``avx512``, or ``torch`` for none of them) when it isn't wanted.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ISAS = ("plain", "avx2", "avx512")
"""Instruction sets, by their number in the library."""
TORCH = "torch"
"""In place of an instruction set: Torch operations."""
SINGLE = (torch.float32,)
BOTH = (torch.float32, torch.float64)


def _load() -> ctypes.CDLL | None:
    try:
        path = importlib.import_module("squall.kernels.native._library").__file__
        assert path is not None
        library = ctypes.CDLL(path)
    except (ImportError, OSError) as error:
        warnings.warn(
            f"Squall's compiled kernels are missing ({error}): Torch operations serve, which are slower. Install"
            " Squall from a wheel, or where there is a C compiler.",
            stacklevel=2,
        )
        return None
    library.squall_set_parallel_region(_parallel_region())
    return library


def _parallel_region() -> ctypes.c_void_p | None:
    """Find ``GOMP_parallel`` of the OpenMP that Torch has loaded; None if there is none, and threads are started."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and ".so" in line}
    except (OSError, IndexError):
        return None
    # Torch's wheel brings its own, which another package's (scikit-learn's) must not stand in for.
    for path in sorted(paths, key=lambda path: ("torch" not in path, path)):
        if "gomp" in os.path.basename(path) or "iomp" in os.path.basename(path):
            try:
                return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
            except (OSError, AttributeError):
                continue
    return None


_library = _load()


def _choose(isa: str | None) -> str:
    """Set the instruction set; returns the one in use."""
    if isa is not None and isa not in (*ISAS, TORCH):
        raise ValueError(f"SQUALL_ISA={isa!r} must be one of {', '.join((*ISAS, TORCH))}.")
    if isa == TORCH or _library is None:
        return TORCH
    chosen = _library.squall_set_isa(-1 if isa is None else ISAS.index(isa))
    if chosen < 0:
        raise ValueError(f"SQUALL_ISA={isa!r}: this machine has no such instructions.")
    return ISAS[chosen]


_isa = _choose(os.environ.get("SQUALL_ISA") or None)


def isa() -> str:
    """Tell which instruction set kernels use, or ``"torch"``."""
    return _isa


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """Use another instruction set within a ``with`` block, in all threads.

    Args:
        isa: One of :data:`ISAS`, or ``"torch"``.

    Raises:
        ValueError: If there is no such one, or this machine lacks it.

    """
    global _isa
    before = _isa
    _isa = _choose(isa)
    try:
        yield
    finally:
        _isa = _choose(before)


def isas() -> list[str]:
    """List the instruction sets that this machine and this library have."""
    if _library is None:
        return []
    found = []
    for index, name in enumerate(ISAS):
        if _library.squall_set_isa(index) == index:
            found.append(name)
    _choose(_isa)
    return found


def serves(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = BOTH) -> bool:
    """Tell whether a kernel can work on tensors: plain memory of the CPU.

    Args:
        tensors: All that it would read; without any, whether there are compiled kernels.
        dtypes: What it was compiled for.

    """
    if _isa == TORCH:
        return False
    for tensor in tensors:  # noqa: SIM110 -- a generator takes longer, and this is asked for each layer
        if not tensor.is_cpu or tensor.dtype not in dtypes:
            return False
    return True


def serves_rows(*rows: torch.Tensor | None) -> bool:
    """Tell whether a kernel can work on flat single-precision tensors: neighbours in plain memory of the CPU.

    Args:
        rows: All that it would read or write; None for those that there aren't.

    """
    there = [row for row in rows if row is not None]
    plain = all(row.is_contiguous() and row.data_ptr() % 4 == 0 for row in there if row.device.type == "cpu")
    return plain and serves(*there, dtypes=SINGLE)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's memory begins, as a kernel takes it; None for one that there isn't."""
    return None if tensor is None else tensor.data_ptr()


def function(name: str, *argument_types: Any, returns: Any = None) -> Any:
    """Find a function of the library.

    Args:
        name: Its name.
        argument_types: Of ctypes.
        returns: Likewise, if it returns anything.

    Returns:
        The function; None if there is no library.

    """
    if _library is None:
        return None
    found = getattr(_library, name)
    found.argtypes = argument_types
    found.restype = returns

    def call(*arguments: Any) -> Any:
        # ctypes takes more arguments than it was told of, and guesses what they are.
        assert len(arguments) == len(argument_types), name
        return found(*arguments)

    return call
