"""Fringes: what windows read of other ranks' tiles, fetched while the interior computes, its gradients sent home.

The distributed array of Coates et al. (2013, section 4): a layer fetches the fringe around its tile, computes, and in
the backward pass adds the fringe's gradients to the tiles that they belong to. Two functions carry that through
autograd, so that messages travel while ranks compute, in both directions:

* ``depart`` sends, forward, what other ranks need, and hands on the tile's own pieces; backward it waits for what
  comes home and adds it to the gradient;
* ``arrive`` waits, forward, for the fringe; backward it sends the fringe's gradients home.

Between them lies the interior's computation, forward and backward. Autograd runs in the reverse order of the
forward pass, which is the same on all ranks, so messages meet. A rank with an empty tile takes part like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .exchange import recompute, send_back, start_fetch, start_home
from .partition import Partition, Range
from .reach import Reach, Span, Window, edges, fringe, reach
from .tensor import Spec
from .tiles import TileSpec

Rectangle = tuple[tuple[int, Range], ...]  # (dimension, range) of each dimension that is cut
Compute = Callable[[Tensor, tuple[Range, ...]], Tensor]


@dataclass
class Flow:
    """One exchange of fringes, forward and back.

    Args:
        axis: The split dimension, its ranks, and what each holds.
        need: What each rank needs of what others hold.
        name: The layer, for the ledger.

    """

    axis: Spec
    need: Partition
    name: str
    _fetched: Callable[[], Tensor] | None = None
    _home: Callable[[Tensor], None] | None = None
    _differentiable: Tensor | None = None

    def depart(self, tile: Tensor) -> None:
        """Begin to fetch the fringe, and to send what others need."""
        axis = self.axis
        self._fetched = start_fetch(tile, axis.dim, axis.partition, self.need, (axis.columns, self.name, False))

    def arrive(self) -> Tensor:
        """Wait for the fringe: what lies before the tile, then what lies behind it."""
        assert self._fetched is not None
        fringe, self._fetched = self._fetched(), None
        return fringe

    def send_home(self, grad: Tensor) -> None:
        """Begin to send the fringe's gradients to their owners."""
        axis = self.axis
        if torch.is_grad_enabled():  # gradients of gradients are asked for: what is sent must have a history
            self._differentiable = grad
        else:
            self._home = start_home(grad, axis.dim, axis.partition, self.need, (axis.columns, self.name, True))

    def come_home(self, own: Tensor) -> Tensor:
        """Add what others have found of the gradient of this tile."""
        axis = self.axis
        if self._home is None and self._differentiable is None:  # nothing here came of the fringe, but others' may have
            shape = list(own.shape)
            shape[axis.dim] = self.need.sizes[axis.columns.rank]
            self.send_home(own.new_zeros(shape) + own.narrow(axis.dim, 0, 0).sum())
        if self._differentiable is not None:
            grad, self._differentiable = self._differentiable, None
            transfer = (axis.columns, self.name, True)
            return own + send_back(grad, axis.dim, axis.partition, self.need, transfer)
        assert self._home is not None
        self._home(own)
        self._home = None
        return own


class _Depart(torch.autograd.Function):
    """A tile's pieces, and an empty tensor that ties ``arrive`` to this; backward, the tile's whole gradient."""

    @staticmethod
    def forward(ctx: Any, tile: Tensor, rectangles: tuple[Rectangle, ...], flow: Flow) -> tuple[Tensor, ...]:
        flow.depart(tile)
        ctx.rectangles, ctx.flow, ctx.shape = rectangles, flow, tile.shape
        ctx.save_for_backward(tile.new_empty(0))
        return (*(_piece(tile, rectangle) for rectangle in rectangles), tile.new_empty(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recompute(ctx)
        if torch.is_grad_enabled():
            padded = [_padded(grad, piece, ctx.shape) for grad, piece in zip(grads, ctx.rectangles, strict=False)]
            # The tie adds nothing but its history, which a rank without fringes needs to answer the others.
            return ctx.flow.come_home(sum(padded, grads[-1].new_zeros(ctx.shape) + grads[-1].sum())), None, None
        found = list(zip(grads, ctx.rectangles, strict=False))
        # Where the interior reads the whole tile, its gradient is fresh and nobody else's: no memory for another one.
        own = next((grad for grad, _ in found if grad.shape == ctx.shape and grad.is_contiguous()), None)
        if own is None:
            own = grads[-1].new_zeros(ctx.shape)
        for grad, rectangle in found:
            if grad is not own:
                _piece(own, rectangle).add_(grad)
        return ctx.flow.come_home(own), None, None


class _Join(torch.autograd.Function):
    """Concatenate; backward, parts in memory of their own, so that the whole gradient can go before they are used."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [part.shape[dim] for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *(part.contiguous() for part in grad.split(ctx.sizes, ctx.dim)))


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    result: Tensor = _Join.apply(dim, *parts) if len(parts) > 1 else parts[0]
    return result


def _none_of(grad: Tensor) -> Tensor:
    """The gradient of a tie: nothing, but with a history."""
    return grad.reshape(-1).narrow(0, 0, 0)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tie: Tensor, flow: Flow) -> Tensor:
        ctx.flow = flow
        ctx.save_for_backward(tie)
        return flow.arrive()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recompute(ctx)
        ctx.flow.send_home(grad)
        return _none_of(grad), None


def _piece(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    for dim, (start, stop) in rectangle:
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _padded(grad: Tensor, rectangle: Rectangle, shape: torch.Size) -> Tensor:
    """``grad`` of a piece, with zeros around it."""
    pad = [0] * (2 * len(shape))
    for dim, (start, stop) in rectangle:
        pad[2 * (len(shape) - 1 - dim)] = start
        pad[2 * (len(shape) - 1 - dim) + 1] = shape[dim] - stop
    return F.pad(grad, pad)


def _depart(tile: Tensor, rectangles: Sequence[Rectangle], flow: Flow) -> tuple[list[Tensor], Tensor]:
    *pieces, tie = _Depart.apply(tile, tuple(rectangles), flow)
    return pieces, tie


def _arrive(tie: Tensor, flow: Flow) -> Tensor:
    result: Tensor = _Arrive.apply(tie, flow)
    return result


def over_windows(
    tile: Tensor, spec: TileSpec, windows: tuple[Window, ...], compute: Compute, fill: float, name: str
) -> tuple[Tensor, TileSpec]:
    """Slide windows over a tiled tensor, the interior first.

    Args:
        tile: This rank's tile, plain.
        spec: How it is split.
        windows: The windows along each split dimension.
        compute: Called with a block, padded along the split dimensions, and the outputs that it makes along each;
            does the rest of the layer's work.
        fill: What padding consists of.
        name: The layer, for the ledger.

    Returns:
        This rank's tile of the outputs, and how they are split.

    """
    outputs = tuple(
        Partition.even(window.num_outputs, axis.columns.num_columns)
        for window, axis in zip(windows, spec.axes, strict=True)
    )
    reaches = tuple(
        reach(window, axis.partition, made, axis.columns.rank)
        for window, axis, made in zip(windows, spec.axes, outputs, strict=True)
    )
    flows = tuple(
        Flow(axis, fringe(window, axis.partition, made), name)
        for window, axis, made in zip(windows, spec.axes, outputs, strict=True)
    )
    job = _Job(tile, spec.dims, windows, reaches, flows, compute, fill)
    return job.one_axis() if len(windows) == 1 else job.two_axes(), spec.resized(outputs)


@dataclass
class _Job:
    """One layer's windows on one rank."""

    tile: Tensor
    dims: tuple[int, ...]
    windows: tuple[Window, ...]
    reaches: tuple[Reach, ...]
    flows: tuple[Flow, ...]
    compute: Compute
    fill: float

    def one_axis(self) -> Tensor:
        (dim,), (along,), (flow,) = self.dims, self.reaches, self.flows
        spans = (along.first, along.interior, along.last)
        own, tie = _depart(self.tile, [((dim, along.parts(span.inputs)[1]),) for span in spans], flow)
        interior = self._made(own[1], (along.interior,))
        fetched = _arrive(tie, flow)
        made = [
            self._made(self._joined(fetched, along, piece, span.inputs, dim), (span,))
            for span, piece in ((along.first, own[0]), (along.last, own[2]))
        ]
        return self._concatenated([made[0], interior, made[1]], dim, (tie,))

    def two_axes(self) -> Tensor:
        """Rows first, then columns, whose fringes hold the corners."""
        high, wide = self.dims
        down, across = self.reaches
        flow = self.flows[1]
        sent = edges(flow.axis.partition, flow.need)
        start = across.held[0]
        leaving = [(low - start, stop - start) for low, stop in sent.ranges[flow.axis.columns.rank]]
        sides = [across.parts(span.inputs)[1] for span in (across.first, across.last)]
        middle = across.parts(across.interior.inputs)[1]
        rows = (down.first, down.interior, down.last)
        rectangles: list[Rectangle] = [((high, down.parts(span.inputs)[1]), (wide, middle)) for span in rows]
        own_rows = down.parts(down.all.inputs)[1]
        rectangles += [((high, own_rows), (wide, columns)) for columns in [*sides, *leaving, (0, 0)]]
        own, tie = _depart(self.tile, rectangles, self.flows[0])
        interior = self._made(own[1], (down.interior, across.interior))
        fetched = _arrive(tie, self.flows[0])
        left, right, *edge = (
            self._joined(_piece(fetched, ((wide, columns),)), down, piece, down.all.inputs, high)
            for piece, columns in zip(own[3:], [*sides, *leaving, (0, 0)], strict=True)
        )
        flow.axis = flow.axis.moved(wide, sent)
        _, second_tie = _depart(torch.cat(edge, wide), [], flow)
        above = _piece(fetched, ((wide, middle),))
        ends = [
            self._made(self._joined(above, down, piece, span.inputs, high), (span, across.interior))
            for span, piece in ((down.first, own[0]), (down.last, own[2]))
        ]
        beside = _arrive(second_tie, flow)
        made = [
            self._made(self._joined(beside, across, piece, span.inputs, wide), (down.all, span))
            for span, piece in ((across.first, left), (across.last, right))
        ]
        column = [part for part in (ends[0], interior, ends[1]) if part is not None]
        result = self._concatenated(
            [made[0], _join(column, high) if column else None, made[1]], wide, (tie, second_tie)
        )
        if flow.need.sizes[flow.axis.columns.rank]:
            return result
        # Nothing here reads that fringe, but others' gradients have to be waited for all the same.
        shape = list(result.shape)
        shape[wide] = 0
        return torch.cat([result, second_tie.reshape(shape)], wide)

    def _joined(self, fetched: Tensor, along: Reach, own: Tensor, inputs: Range, dim: int) -> Tensor:
        """A range of inputs, put together of the fringe before the tile, the tile's own piece, the fringe behind."""
        (start, stop), _, (low, high) = along.parts(inputs)
        first = along.fringes[0]
        offset = first[1] - first[0]
        parts = [fetched.narrow(dim, start, stop - start), own, fetched.narrow(dim, offset + low, high - low)]
        parts = [part for part in parts if part.shape[dim]]
        return torch.cat(parts, dim) if len(parts) > 1 else (parts or [own])[0]

    def _made(self, block: Tensor, spans: tuple[Span, ...]) -> Tensor | None:
        """What ``spans`` of outputs come to; ``None`` for no outputs."""
        if not all(span.num_outputs for span in spans):
            return None
        pad = [0] * (2 * block.ndim)
        for dim, span in zip(self.dims, spans, strict=True):
            pad[2 * (block.ndim - 1 - dim)], pad[2 * (block.ndim - 1 - dim) + 1] = span.before, span.after
        if any(pad):
            block = F.pad(block, pad, value=self.fill)
        return self.compute(block, tuple(span.outputs for span in spans))

    def _concatenated(self, parts: Sequence[Tensor | None], dim: int, ties: tuple[Tensor, ...]) -> Tensor:
        made = [part for part in parts if part is not None]
        if not made:
            return self._nothing() + torch.cat(ties).sum()
        return _join(made, dim)

    def _nothing(self) -> Tensor:
        """A tile without outputs, in the shape that the others have beside: what a window makes, none of it taken."""
        shape = list(self.tile.shape)
        for dim, window in zip(self.dims, self.windows, strict=True):
            shape[dim] = window.extent
        result = self.compute(self.tile.new_zeros(shape), ((0, 0),) * len(self.dims))
        sizes = list(result.shape)
        for dim, along in zip(self.dims, self.reaches, strict=True):
            sizes[dim] = along.all.num_outputs
            result = result.narrow(dim, 0, 0)
        return result.reshape(sizes)
