"""The update of a shard's weights and optimizer state: decode, and a step of SGD, Adagrad or Adam.

A plain function on tensors, no custom op: shards call it, whom neither autograd nor a compiler meets. Without the
compiled library shards step Torch's own optimizers (:mod:`squall.consistency.updates`), whose numbers these are but for
rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from squall.kernels import native

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_kernel = native.function(
    "squall_shard_update", *[_INT] * 2, *[_POINTER] * 2, _LONG, *[_POINTER] * 4, _LONG, _POINTER, *[_INT] * 3
)
CODECS = ("fp32", "bf16", "int8", "1bit", "topk")
"""Codes that it decodes, by their number in the library."""
OPTIMIZERS = ("sgd", "adagrad", "adam")


class Step(NamedTuple):
    """What to do with a gradient.

    Args:
        optimizer: ``"sgd"``, ``"adagrad"`` or ``"adam"``.
        rate: The learning rate, corrected for the number of the step where the optimizer does so.
        sign: -1 to go up instead of down.
        decay: How much of the weights is added to the gradient.
        shrink: What weights are multiplied with beforehand (Adam).
        first: What the momentum, or the first mean, is multiplied with.
        new_first: What the gradient is multiplied with that is added to it.
        second: Likewise of the mean of squares.
        new_second: Likewise.
        eps: What is added to the root of squares.
        root: What the root of squares is divided by (Adam).
        nesterov: Whether the step is as far as the momentum will go next.

    """

    optimizer: str
    rate: float
    sign: float = 1.0
    decay: float = 0.0
    shrink: float = 1.0
    first: float = 0.0
    new_first: float = 0.0
    second: float = 0.0
    new_second: float = 0.0
    eps: float = 0.0
    root: float = 1.0
    nesterov: bool = False


def shard_update(
    codec: str,
    code: Tensor,
    weights: Tensor,
    states: Sequence[Tensor],
    step: Step,
    begins: bool = False,
    values: Tensor | None = None,
) -> None:
    """Decode a gradient and step with it, in place.

    Args:
        codec: One of :data:`CODECS`.
        code: Its bytes, as :meth:`squall.consistency.Codec.encode` wrote them; places of ``topk`` must have been
            checked.
        weights: Shape (n,), float32.
        states: Each of the same shape: none or the momentum (SGD), the sum of squares (Adagrad), both means and perhaps
            the largest second one (Adam).
        step: What to do.
        begins: The momentum has no value yet, and becomes the gradient.
        values: What codes of ``int8`` stand for, float32.

    Raises:
        ValueError: Tensors aren't flat single-precision memory of the CPU, of the same length, or their number isn't
            the optimizer's; there is no such codec or optimizer; or there is no compiled kernel.

    """
    num = weights.numel()
    if codec not in CODECS or step.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"codec={codec!r} must be one of {', '.join(CODECS)}, step.optimizer={step.optimizer!r} one of"
            f" {', '.join(OPTIMIZERS)}"
        )
    if len(states) not in {"sgd": (0, 1), "adagrad": (1,), "adam": (2, 3)}[step.optimizer]:
        raise ValueError(f"states are {len(states)} tensors, which is not what {step.optimizer} keeps")
    if not native.serves_rows(weights, *states) or any(state.numel() != num for state in states):
        raise ValueError(
            f"weights and states must be flat float32 on the CPU, {num} each, and the kernels compiled (they are:"
            f" {native.isa()}); got {[(t.dtype, str(t.device), tuple(t.shape)) for t in (weights, *states)]}"
        )
    num_kept = code.numel() // 8 if codec == "topk" else 0
    num_blocks = -(-num // 2048)
    sizes = {"fp32": 4 * num, "bf16": 2 * num, "int8": 4 * num_blocks + num, "topk": 8 * num_kept}
    size = sizes.get(codec, 8 * num_blocks + -(-num // 8))
    if code.dtype != torch.uint8 or code.numel() != size or not code.is_contiguous() or code.device.type != "cpu":
        raise ValueError(
            f"code must be {size} contiguous uint8 on the CPU for {num} numbers of {codec}, got {code.dtype} of shape"
            f" {tuple(code.shape)} on {code.device}"
        )
    if code.data_ptr() % 4:
        raise ValueError("code must begin at an address that is a multiple of 4")
    if codec == "int8" and (values is None or not native.serves_rows(values) or values.numel() != 256):
        raise ValueError("values must be the 256 float32 that codes of int8 stand for")
    numbers = (ctypes.c_double * 10)(
        step.sign, step.decay, step.shrink, step.rate, step.first, step.new_first, step.second, step.new_second,
        step.eps, step.root,
    )  # fmt: skip
    pointers = [state.data_ptr() for state in states] + [None] * (3 - len(states))
    _kernel(
        CODECS.index(codec), OPTIMIZERS.index(step.optimizer), code.data_ptr(),
        native.pointer(values), num_kept, weights.data_ptr(), *pointers, num, numbers, begins,
        step.nesterov, torch.get_num_threads(),
    )  # fmt: skip
