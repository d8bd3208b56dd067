"""The backward pass of a linear layer in columns when it is to be differentiated itself, as a gradient penalty asks.

It has no passes and hides nothing: everybody's examples, and their gradients, are fetched, used, and sent back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tensor import Spec

if TYPE_CHECKING:
    from .linear import ExampleColumns


def differentiable_gradients(
    rows: Tensor, weight: Tensor, grad: Tensor, spec: Spec, num_examples: Sequence[int], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute what the layer's backward pass does, in operations with gradients.

    Args:
        rows: This rank's examples, shape (own examples, inputs).
        weight: This rank's outputs of the layer, shape (own outputs, inputs).
        grad: Of all outputs of this rank's examples, shape (own examples, outputs).
        spec: How the outputs are split.
        num_examples: Of each rank.
        wanted: Whether the gradients of rows, weight and bias are.

    Returns:
        Gradients of rows, weight and bias, None where not wanted; those of weights are means over the ranks.

    """
    columns: ExampleColumns = spec.columns  # type: ignore[assignment]
    of_rows, of_weight, of_bias = wanted
    share, (own, inputs) = 1 / columns.num_columns, rows.shape
    weight = weight.as_subclass(Tensor)

    def swap(parts: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        swapped: tuple[Tensor, ...] = _Swap.apply(columns, spec.name, shapes, *parts)
        return swapped

    block = torch.cat(swap(grad.split(spec.partition.sizes, 1), [(number, len(weight)) for number in num_examples]))
    weight_grad = rows_grad = None
    if of_weight:
        everybody = torch.cat(swap([rows] * columns.num_columns, [(number, inputs) for number in num_examples]))
        weight_grad = share * (block.t() @ everybody)
    if of_rows:
        averaged = weight.view_as(weight)
        if averaged.requires_grad:
            averaged.register_hook(lambda of_averaged: share * of_averaged)  # a mean over the ranks, as ever
        partials = swap((block @ averaged).split(list(num_examples)), [(own, inputs)] * columns.num_columns)
        rows_grad = torch.stack(partials).sum(0)
    return rows_grad, weight_grad, share * block.sum(0) if of_bias else None


class _Swap(torch.autograd.Function):
    """Every rank sends a part to each, and gets one from each; gradients go the same way back."""

    @staticmethod
    def forward(
        ctx: Any, columns: ExampleColumns, layer: str, shapes: Sequence[tuple[int, int]], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.columns, ctx.layer, ctx.shapes = columns, layer, [tuple(part.shape) for part in parts]
        me = columns.rank
        sends = {peer: part.contiguous() for peer, part in enumerate(parts) if peer != me}
        received = [parts[me].new_empty(shape) for shape in shapes]
        received[me].copy_(parts[me])
        works = columns.start_swap(sends, {peer: part for peer, part in enumerate(received) if peer != me})
        for part in sends.values():
            columns.ledger.record(layer, part.numel(), part.element_size(), True)
        for work in works:
            work.wait()
        return tuple(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.columns.agree(ctx.layer, True, len(grads[0]), grads[0].device)
        return None, None, None, *_Swap.apply(ctx.columns, ctx.layer, ctx.shapes, *grads)
