"""A linear layer in columns over ranks that have examples of their own.

A rank holds some outputs of the layer and some examples of the step. It sends its examples' inputs to all columns,
computes its own outputs of everybody's examples, and gets the other outputs of its own examples back; backward it is
the same with gradients. Whatever stands between two layers (activations, dropout, a loss) sees a rank's own examples
with all their features, as under data parallelism, so any program may.

Examples go in passes (``schemes``). What pass k + 1 reads travels while pass k computes, and so does what pass k - 1
has computed (Krizhevsky 2014, section 4).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..columns import Columns
from ..tensor import Spec
from .schemes import Pass, Scheme, deal_passes
from .twice import differentiable_gradients


@dataclass(frozen=True)
class Event:
    """What a rank did in a pass of a layer.

    Args:
        what: ``"fetch"`` from when what the pass reads was sent to when it had come, ``"compute"``, or ``"return"``
            from when the results were sent to when all had come.
        layer: Name of the layer.
        backward: Whether it belongs to the backward pass.
        number: Which pass of the layer, from 0.
        start: On the clock of ``time.perf_counter``.
        stop: Likewise.
        waited: Seconds of these in which nothing was computed.

    """

    what: str
    layer: str
    backward: bool
    number: int
    start: float
    stop: float
    waited: float = 0.0


class ExampleColumns(Columns):
    """Ranks that hold the columns of linear layers between them, and examples of their own each.

    Args:
        group: Their process group, used for nothing else; ``None`` for one rank.
        rank: This process's place among them.
        num_columns: Their number.
        scheme: How examples are dealt out to passes.

    """

    losses_differ = True

    def __init__(self, group: dist.ProcessGroup | None, rank: int, num_columns: int, scheme: Scheme) -> None:
        super().__init__(group, rank, num_columns)
        self.scheme = scheme
        self.timeline: list[Event] = []

    def start_step(self, num_images: int) -> None:
        """Forget the last step's crossings and events; what follows belongs to ``num_images`` images of this rank."""
        self.ledger.start_step(num_images)
        self.timeline = []

    def agree(self, layer: str, backward: bool, num_examples: int, device: torch.device) -> list[int]:
        """Tell all ranks how many examples this one brings to a layer, and hear theirs.

        Raises:
            RuntimeError: If another rank is at another layer, or the run has broken off.

        """
        if self.closed:
            raise RuntimeError(self._closed)
        if self.num_columns == 1:
            return [num_examples]
        place = zlib.crc32(f"{layer} {'backward' if backward else 'forward'}".encode())
        mine = torch.tensor([place, num_examples], device=device)
        told = [torch.empty_like(mine) for _ in range(self.num_columns)]
        dist.all_gather(told, mine, group=self.group)
        others = torch.stack(told).tolist()
        if any(other != place for other, _ in others):
            raise RuntimeError(
                f"This rank is at the {'backward' if backward else 'forward'} pass of {layer}, and another one is not: "
                "under HybridParallelStrategy all ranks must run the same fully connected layers in the same order. "
                f"Where it depends on the data whether {layer} runs, keep it whole: layout={{{layer!r}: 'whole'}}."
            )
        return [number for _, number in others]


def linear_in_passes(value: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
    """Apply a layer whose outputs are split to this rank's examples.

    The gradients of its weights are means over the ranks, as those of a layer under data parallelism after they have
    been averaged.

    Args:
        value: This rank's examples, shape (..., inputs).
        weight: This rank's outputs of the layer, shape (own outputs, inputs).
        bias: The same of its bias, shape (own outputs,).
        spec: How the outputs are split; its columns are :class:`ExampleColumns`.

    Returns:
        All outputs of this rank's examples, shape (..., outputs).

    Raises:
        RuntimeError: If the ranks are at different layers, on all of them.

    """
    rows = value.reshape(-1, value.shape[-1])
    result: Tensor = _LinearInPasses.apply(rows, weight, None if bias is None else bias.to(weight.dtype), spec)
    return result.reshape(*value.shape[:-1], spec.partition.size)


class _LinearInPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
        columns: ExampleColumns = spec.columns  # type: ignore[assignment]
        saved = rows, weight
        weight = weight.detach().as_subclass(Tensor)
        bias = None if bias is None else bias.detach().as_subclass(Tensor)
        passes = deal_passes(columns.scheme, columns.agree(spec.name, False, len(rows), rows.device))
        blocks = []

        def compute(block: Tensor) -> Tensor:
            blocks.append(block)
            return torch.nn.functional.linear(block, weight, bias)

        outgoing = [rows.detach().contiguous()] * columns.num_columns
        returned = in_passes((columns, spec.name, False), passes, outgoing, compute, spec.partition.sizes)
        ctx.spec, ctx.passes, ctx.has_bias = spec, passes, bias is not None
        ctx.save_for_backward(*saved, *(blocks if ctx.needs_input_grad[1] else ()))
        return torch.cat(returned, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        columns: ExampleColumns = spec.columns  # type: ignore[assignment]
        rows, weight, *blocks = ctx.saved_tensors
        of_inputs, of_weight, of_bias, _ = ctx.needs_input_grad
        num_examples = columns.agree(spec.name, True, len(grad), grad.device)
        if torch.is_grad_enabled():  # create_graph=True
            wanted = of_inputs, of_weight, of_bias
            return *differentiable_gradients(rows, weight, grad, spec, num_examples, wanted), None
        weight = weight.as_subclass(Tensor)
        weight_grad = (torch.empty_like if blocks else torch.zeros_like)(weight) if of_weight else None
        bias_grad = weight.new_zeros(len(weight)) if of_bias else None
        share, saved = 1 / columns.num_columns, iter(enumerate(blocks))

        def compute(block: Tensor) -> Tensor:
            if weight_grad is not None:
                number, inputs = next(saved)
                weight_grad.addmm_(block.t(), inputs, beta=min(number, 1), alpha=share)  # the first one overwrites
            if bias_grad is not None:
                bias_grad.add_(block.sum(0), alpha=share)
            return block @ weight if of_inputs else block.new_empty(len(block), 0)

        outgoing = [part.contiguous() for part in grad.split(spec.partition.sizes, 1)]
        widths = [weight.shape[1] if of_inputs else 0] * columns.num_columns
        returned = in_passes((columns, spec.name, True), ctx.passes, outgoing, compute, widths)
        rows_grad = None
        if of_inputs:
            rows_grad = returned[0]
            for partial in returned[1:]:  # in the order of the ranks, on each of them
                rows_grad += partial
        return rows_grad, weight_grad, bias_grad, None


def in_passes(
    account: tuple[ExampleColumns, str, bool],
    passes: Sequence[Pass],
    outgoing: Sequence[Tensor],
    compute: Callable[[Tensor], Tensor],
    widths: Sequence[int],
) -> list[Tensor]:
    """Let all columns compute something of everybody's examples, pass by pass.

    Args:
        account: The columns, the layer, and whether this is its backward pass.
        passes: Which examples are computed together.
        outgoing: What each rank's columns read of this rank's examples, shape (own examples, features) each.
        compute: From a pass's examples, shape (examples of the pass, features), what this rank's columns have to say.
        widths: Numbers of features that each rank's columns have to say of an example.

    Returns:
        What each rank's columns have said of this rank's examples, shape (own examples, width) each.

    """
    columns, layer, backward = account
    me, peers = columns.rank, range(columns.num_columns)
    columns.ledger.record(layer, 0, outgoing[me].element_size(), backward)
    returned = [outgoing[me].new_empty(len(outgoing[me]), width) for width in widths]
    results: list[Tensor] = []  # alive until the last transfer has ended
    returns: list[_Transfer] = []

    def start(what: str, number: int, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> _Transfer:
        sends = {peer: tensor for peer, tensor in sends.items() if peer != me and tensor.numel()}
        receives = {peer: tensor for peer, tensor in receives.items() if peer != me and tensor.numel()}
        for tensor in sends.values():
            columns.ledger.record(layer, tensor.numel(), tensor.element_size(), backward)
        return _Transfer(account, what, number, columns.start_swap(sends, receives), time.perf_counter())

    def fetch(number: int) -> tuple[Tensor, _Transfer]:
        sizes = [stop - begin for begin, stop in passes[number]]
        block = outgoing[me].new_empty(sum(sizes), outgoing[me].shape[1])
        parts = block.split(sizes)
        own = slice(*passes[number][me])
        parts[me].copy_(outgoing[me][own])
        sends = {peer: outgoing[peer][own] for peer in peers}
        return block, start("fetch", number, sends, dict(enumerate(parts)))

    coming = fetch(0) if passes else None
    for number, ranges in enumerate(passes):
        assert coming is not None
        block, transfer = coming
        coming = fetch(number + 1) if number + 1 < len(passes) else None  # travels while this pass computes
        transfer.wait()
        begin = time.perf_counter()
        results.append(compute(block))
        columns.timeline.append(Event("compute", layer, backward, number, begin, time.perf_counter()))
        parts = results[-1].split([stop - first for first, stop in ranges])
        own = slice(*ranges[me])
        returned[me][own] = parts[me]
        receives = {peer: returned[peer][own] for peer in peers}
        returns.append(start("return", number, dict(enumerate(parts)), receives))
    for transfer in returns:
        transfer.wait()
    return returned


@dataclass(frozen=True)
class _Transfer:
    account: tuple[ExampleColumns, str, bool]
    what: str
    number: int
    works: list[dist.Work]
    start: float

    def wait(self) -> None:
        columns, layer, backward = self.account
        begin = time.perf_counter()
        for work in self.works:
            work.wait()
        stop = time.perf_counter()
        columns.timeline.append(Event(self.what, layer, backward, self.number, self.start, stop, stop - begin))
