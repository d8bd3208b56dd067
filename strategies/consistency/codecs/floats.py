"""Codes that are floating-point numbers themselves: ``fp32``, ``fp64`` and ``bf16``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec, aligned_view, check_length, chunk_size, keep_loss, load, store


@dataclass(frozen=True)
class FloatCodec(Codec):
    """Rounds each number to a type and sends that.

    What the type can't hold rounds to infinity (a float64 of 1e40 in ``fp32``), as Torch's conversions do.

    Args:
        name: What :func:`get_codec` knows it by.
        dtype: The type that is sent.

    """

    name: str
    dtype: torch.dtype

    def num_bytes(self, num_elements: int) -> int:
        """Say how many bytes the code takes: the type's size for each."""
        return check_length(num_elements) * self.dtype.itemsize

    def _write(self, values: Tensor, out: Tensor) -> None:
        numbers = aligned_view(out, self.dtype)
        if numbers is None:
            store(values.to(self.dtype), out)
        else:
            numbers.copy_(values)

    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        if residual is None:
            self._write(values, out)
            return
        size, step = self.dtype.itemsize, chunk_size(values)
        for start in range(0, values.numel(), step):
            lost = residual[start : start + step]
            wanted = lost + values[start : start + step]  # in float64 where the values are, so fp64 loses nothing
            code = out[start * size : (start + step) * size]
            self._write(wanted, code)
            lost.copy_(wanted.sub_(load(code, self.dtype)))
            keep_loss(lost)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        size, step = self.dtype.itemsize, chunk_size(out)
        if aligned_view(data, self.dtype) is not None:
            step = out.numel()
        for start in range(0, out.numel(), step):
            out[start : start + step].copy_(load(data[start * size : (start + step) * size], self.dtype))
