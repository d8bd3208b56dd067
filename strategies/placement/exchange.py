"""Moving channels between columns, with gradients.

Every value of a placed model is of one of two kinds, and its gradient follows the same kind:

* *split*: a rank holds its own channels; its gradient is the whole gradient of those channels;
* *replicated*: all columns hold the same value; its gradient is the same, whole gradient on all of them.

What changes kind, or changes who holds what, therefore comes in four forms, each with the backward that keeps this true
(Krizhevsky 2012, section 3.5, has the first; the others are what an arbitrary program around it needs):

============== ============================ ======================================= ==================================
function       forward                      consumer                                backward
============== ============================ ======================================= ==================================
``exchange``   fetch the channels needed    differs by rank (a split layer)         send partial sums home and add them
``gather``     fetch all channels           the same on all ranks (the loss)        keep one's own channels
``take``       keep one's own channels      differs by rank, input replicated       fetch all channels
``share``      nothing                      differs by rank, input replicated       add up over the ranks
============== ============================ ======================================= ==================================

Where every rank has a loss of its own (``losses_differ``), a replicated value's gradients do, too, and the backward of
``gather`` averages them first. All are linear, and the backward of each is one of the functions here, so gradients of
gradients work too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .columns import Columns
from .partition import Partition, crosses, overlaps

Transfer = tuple[Columns, str, bool]  # who, on whose account, and whether it belongs to the backward pass


class Axis(Protocol):
    """A split dimension."""

    @property
    def dim(self) -> int:
        """Which one, non-negative."""

    @property
    def partition(self) -> Partition:
        """The ranges of it that each rank holds."""

    @property
    def columns(self) -> Columns:
        """The ranks."""


def _pack(tensor: Tensor, dim: int, pieces: list[tuple[int, int]]) -> Tensor:
    """The ``(offset, length)`` pieces of ``tensor`` along ``dim``, contiguous; the tensor itself where that is all."""
    if len(pieces) == 1:
        offset, length = pieces[0]
        whole = offset == 0 and length == tensor.shape[dim]
        return (tensor if whole else tensor.narrow(dim, offset, length)).contiguous()
    # ``cat`` keeps a channels-last order, which can't be sent.
    return torch.cat([tensor.narrow(dim, offset, length) for offset, length in pieces], dim).contiguous()


def _like(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_empty(shape)


def fetch(local: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer) -> Tensor:
    """Assemble the channels that this rank needs from the ranks that hold them.

    Args:
        local: What this rank holds, ``have.sizes[rank]`` elements along ``dim``.
        dim: The split dimension, non-negative.
        have: Which channels each rank holds, no two the same.
        need: Which channels each rank needs; these may overlap.
        transfer: The columns, the name in their ledger, and the direction to count under.

    Returns:
        The needed channels in the order of ``need``.

    """
    return start_fetch(local, dim, have, need, transfer)()


def start_fetch(local: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer) -> Callable[[], Tensor]:
    """Begin a :func:`fetch`; calling the result waits for it. All ranks begin and end theirs in the same order."""
    columns, name, backward = transfer
    me = columns.rank
    if have == need:
        return lambda: local
    if crosses(have, need):
        columns.ledger.record(name, 0, local.element_size(), backward)
    sends: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    pieces: list[tuple[int, int, Tensor, int]] = []  # target offset, length, source, source offset
    for peer in range(columns.num_columns):
        outgoing = overlaps(have.ranges[me], need.ranges[peer])
        if peer == me:
            pieces += [(target, length, local, source) for source, target, length in outgoing]
            continue
        if outgoing:
            sends[peer] = _pack(local, dim, [(source, length) for source, _, length in outgoing])
            columns.ledger.record(name, sends[peer].numel(), local.element_size(), backward)
        incoming = overlaps(have.ranges[peer], need.ranges[me])
        if incoming:
            buffers[peer] = _like(local, dim, sum(length for _, _, length in incoming))
            offset = 0
            for _, target, length in incoming:
                pieces.append((target, length, buffers[peer], offset))
                offset += length
    works = columns.start_swap(sends, buffers)

    def finish() -> Tensor:
        _wait(works, sends)
        parts = [source.narrow(dim, offset, length) for _, length, source, offset in sorted(pieces, key=lambda p: p[0])]
        return torch.cat(parts, dim) if parts else _like(local, dim, 0)

    return finish


def _wait(works: list[dist.Work], sends: dict[int, Tensor]) -> None:
    """Wait until everything has been received, and what was sent is no longer needed."""
    for work in works:
        work.wait()
    sends.clear()


def send_home(grad: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer) -> Tensor:
    """The transpose of :func:`fetch`: send each channel's partial gradient to its owner, who adds them up."""
    if have == need:
        return grad
    me = transfer[0].rank
    own = _like(grad, dim, have.sizes[me]).zero_()
    for source, target, length in overlaps(have.ranges[me], need.ranges[me]):
        own.narrow(dim, source, length).copy_(grad.narrow(dim, target, length))
    start_home(grad, dim, have, need, transfer)(own)
    return own


def start_home(
    grad: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer
) -> Callable[[Tensor], None]:
    """Begin to send partial gradients to the ranks that own their channels.

    Returns:
        A function that waits for those that come home, and adds them to the tensor that it is given.

    """
    columns, name, backward = transfer
    me = columns.rank
    if crosses(have, need):
        columns.ledger.record(name, 0, grad.element_size(), backward)
    sends: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    for peer in range(columns.num_columns):
        if peer == me:
            continue
        outgoing = overlaps(have.ranges[peer], need.ranges[me])
        if outgoing:
            sends[peer] = _pack(grad, dim, [(target, length) for _, target, length in outgoing])
            columns.ledger.record(name, sends[peer].numel(), grad.element_size(), backward)
        incoming = overlaps(have.ranges[me], need.ranges[peer])
        if incoming:
            buffers[peer] = _like(grad, dim, sum(length for _, _, length in incoming))
    works = columns.start_swap(sends, buffers)

    def finish(own: Tensor) -> None:
        _wait(works, sends)
        for peer, buffer in buffers.items():
            offset = 0
            for source, _, length in overlaps(have.ranges[me], need.ranges[peer]):
                own.narrow(dim, source, length).add_(buffer.narrow(dim, offset, length))
                offset += length

    return finish


def _slice(full: Tensor, dim: int, partition: Partition, rank: int) -> Tensor:
    held = [(start, stop - start) for start, stop in partition.ranges[rank]]
    return _pack(full, dim, held) if held else _like(full, dim, 0)


def _other_way(transfer: Transfer) -> Transfer:
    return (transfer[0], transfer[1], not transfer[2])


def recompute(ctx: Any) -> None:
    """Have a checkpoint that is passed backward recomputed now, if it has not been.

    torch does it when the first saved tensor is asked for. On a rank with nothing to compute behind a message that
    would be after the message has been sent back, and on the others before: each would take one for the other.
    """
    _ = ctx.saved_tensors


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer, home: bool
    ) -> Tensor:
        ctx.arguments = (dim, have, need, _other_way(transfer), not home)
        ctx.save_for_backward(local.new_empty(0))
        return (send_home if home else fetch)(local, dim, have, need, transfer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recompute(ctx)
        return _Exchange.apply(grad, *ctx.arguments), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, have: Partition, transfer: Transfer) -> Tensor:
        ctx.arguments = (dim, have, _other_way(transfer))
        return fetch(local, dim, have, Partition.whole(have.size, have.num_ranks), transfer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        columns = ctx.arguments[-1][0]
        if columns.losses_differ:
            grad = _Average.apply(grad, columns)
        return _Take.apply(grad, *ctx.arguments), None, None, None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return columns.sum_(value.clone(memory_format=torch.contiguous_format)) / columns.num_columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Average.apply(grad, ctx.columns), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, dim: int, have: Partition, transfer: Transfer) -> Tensor:
        ctx.arguments = (dim, have, _other_way(transfer))
        return _slice(full, dim, have, transfer[0].rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Gather.apply(grad, *ctx.arguments), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, transfer: Transfer, add_up: bool) -> Tensor:
        ctx.arguments = (_other_way(transfer), not add_up)
        if not add_up:
            return full.view_as(full)
        columns, name, backward = transfer
        if columns.num_columns > 1:
            columns.ledger.record(name, full.numel(), full.element_size(), backward)
        return columns.sum_(full.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Share.apply(grad, *ctx.arguments), None, None


def exchange(local: Tensor, dim: int, have: Partition, need: Partition, columns: Columns, name: str) -> Tensor:
    """Fetch the channels that a split consumer needs; partial gradients go home and are added up."""
    if have == need:
        return local
    result: Tensor = _Exchange.apply(local, dim, have, need, (columns, name, False), False)
    return result


def gather(local: Tensor, dim: int, have: Partition, columns: Columns, name: str) -> Tensor:
    """Fetch all channels for a consumer that does the same on every rank; gradients are cut, not added."""
    result: Tensor = _Gather.apply(local, dim, have, (columns, name, False))
    return result


def take(full: Tensor, dim: int, have: Partition, columns: Columns, name: str) -> Tensor:
    """Keep this rank's channels of a replicated tensor; its gradient is fetched whole."""
    result: Tensor = _Take.apply(full, dim, have, (columns, name, False))
    return result


def share(full: Tensor, columns: Columns, name: str) -> Tensor:
    """Hand a replicated tensor to a consumer that differs by rank; partial gradients are added up."""
    if columns.num_columns == 1 or not (full.requires_grad and torch.is_grad_enabled()):
        return full
    result: Tensor = _Share.apply(full, (columns, name, False), False)
    return result


def add_up(partial: Tensor, columns: Columns, name: str) -> Tensor:
    """Add up what every rank has a part of; the sum is replicated, and so is its gradient."""
    result: Tensor = _Share.apply(partial, (columns, name, False), True)
    return result


def send_back(grad: Tensor, dim: int, have: Partition, need: Partition, transfer: Transfer) -> Tensor:
    """:func:`send_home` with gradients of its own."""
    result: Tensor = _Exchange.apply(grad, dim, have, need, transfer, True)
    return result


def cut(full: Tensor, axes: Iterable[Axis], name: str) -> Tensor:
    """:func:`take` along every split dimension."""
    for axis in axes:
        full = take(full, axis.dim, axis.partition, axis.columns, name)
    return full
