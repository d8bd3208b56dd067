"""Which tensors Triton's kernels are for."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def triton_serves(*tensors: Tensor | None) -> bool:
    """Tell whether tensors are on a CUDA device and Triton is installed.

    Args:
        tensors: All that a kernel would read or write; None for those that there aren't. In double precision a kernel's
            constants would be single, so these are left to Torch.

    """
    there = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in there)
        and importlib.util.find_spec("triton") is not None
    )
