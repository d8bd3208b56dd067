"""What a codec is: flat numbers to a fixed number of bytes and back, and the checks that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Numbers worked on at a time on a CPU: 512 KiB a buffer. Fewer would stay in a nearer cache, but a step on the few
numbers that describe blocks costs as long as one on thousands, and there are a dozen of those a chunk."""


class Codec(ABC):
    """Turns a flat floating-point tensor into bytes whose number depends on its length only, and back.

    Codes are in the machine's byte order, little-endian wherever Torch runs. All memory is the caller's: a slice at any
    offset, of shared memory or of a message, does. A codec has no state, so one may serve many tensors and threads.

    Attributes:
        name: What :func:`get_codec` knows it by.
        has_residual: Whether it is meant to be used with error feedback; all of them can be.

    """

    name: str
    has_residual: bool = False

    @property
    def spec(self) -> str:
        """What :func:`get_codec` makes an equal codec from."""
        return self.name

    @abstractmethod
    def num_bytes(self, num_elements: int) -> int:
        """Say how many bytes the code of ``num_elements`` numbers takes, whatever the numbers are."""

    @torch.no_grad()
    def encode(self, values: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """Write the code of ``values``, or of ``values + residual``, to ``out``.

        Error feedback (Seide et al. 2014, section 3.2) keeps in ``residual`` what a code lost and adds it to what is
        coded next, so that nothing is lost for good.

        Numbers that aren't finite don't vanish: their block decodes to NaN (``int8``, ``1bit``), or they decode to
        themselves (the others; ``topk`` has room for so many). They leave no trace in ``residual``, which is zero there
        afterwards, so the code of a later step is finite again.

        Args:
            values: Shape (n,), any floating-point dtype, n at least 1. It isn't modified.
            out: Shape (``num_bytes(n)``,), uint8, contiguous.
            residual: Shape (n,), float32; becomes, in place, what the code lost.

        Raises:
            ValueError: A shape or dtype is another, or the tensors are on different devices.

        """
        num_elements = _check_numbers("values", values)
        _check_bytes("out", out, self.num_bytes(num_elements), values)
        if residual is not None:
            _check_numbers("residual", residual)
            if residual.dtype != torch.float32 or residual.numel() != num_elements or residual.device != values.device:
                raise ValueError(
                    f"residual must be float32, as long as values ({num_elements}) and on {values.device}, got "
                    f"{residual.dtype}, {residual.numel()} elements on {residual.device}"
                )
        self._encode(values, out, residual)

    @torch.no_grad()
    def decode(self, data: Tensor, out: Tensor) -> None:
        """Overwrite ``out`` with the numbers that ``data`` is the code of.

        Any bytes decode to something, except those of ``topk``, which can be recognised as no code.

        Args:
            data: Shape (``num_bytes(n)``,), uint8, contiguous.
            out: Shape (n,), any floating-point dtype.

        Raises:
            ValueError: A shape or dtype is another, or the bytes aren't a code; ``out`` is as it was then.

        """
        _check_bytes("data", data, self.num_bytes(_check_numbers("out", out)), out)
        self._decode(data, out)

    @abstractmethod
    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        """Do what :meth:`encode` says with what it has checked."""

    @abstractmethod
    def _decode(self, data: Tensor, out: Tensor) -> None:
        """Do what :meth:`decode` says with what it has checked."""


def check_length(num_elements: int) -> int:
    """Return ``num_elements``, which must be at least 1."""
    if num_elements < 1:
        raise ValueError(f"num_elements must be at least 1, got {num_elements}")
    return num_elements


def _check_numbers(name: str, tensor: Tensor) -> int:
    if tensor.ndim != 1 or not tensor.is_floating_point() or not tensor.numel():
        raise ValueError(
            f"{name} must be a flat floating-point tensor of 1 element or more, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor.numel()


def _check_bytes(name: str, tensor: Tensor, num_bytes: int, numbers: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.shape != (num_bytes,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {num_bytes} contiguous uint8 for {numbers.numel()} numbers, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device != numbers.device:
        raise ValueError(f"{name} is on {tensor.device}, the numbers are on {numbers.device}; they must be together")


def chunk_size(tensor: Tensor) -> int:
    """How many numbers to work on at a time: what the cache holds on a CPU, everything elsewhere."""
    return CHUNK if tensor.device.type == "cpu" else tensor.numel()


def store(values: Tensor, out: Tensor) -> None:
    """Write the bytes of ``values`` to ``out``, which need not be aligned."""
    numbers = values.contiguous()
    # A single number is contiguous whatever its stride, but its bytes can be seen with a stride of 1 only.
    out.copy_(numbers.as_strided((numbers.numel(),), (1,)).view(torch.uint8))


def aligned_view(data: Tensor, dtype: torch.dtype) -> Tensor | None:
    """See bytes as numbers without a copy, or None where their address doesn't allow it."""
    size = dtype.itemsize
    aligned = data.storage_offset() % size == 0 and data.data_ptr() % size == 0
    return data.view(dtype) if aligned else None


def load(data: Tensor, dtype: torch.dtype) -> Tensor:
    """See bytes as numbers; those at an odd address are copied first."""
    numbers = aligned_view(data, dtype)
    return data.clone().view(dtype) if numbers is None else numbers


def keep_loss(residual: Tensor) -> None:
    """Zero what isn't finite: once in the residual it would come back in every code."""
    residual.nan_to_num_(0.0, 0.0, 0.0)
