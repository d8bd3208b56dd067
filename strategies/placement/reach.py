"""How far windows reach: which places of the input a tile of the output reads. Interval arithmetic, no tensors.

A convolution or pooling slides windows along each dimension. A rank computes the outputs of its own tile; those whose
windows stay within what it holds are its interior, and the others, at either side, wait for fringes: places that
other ranks hold, be they neighbours or, where tiles are smaller than windows, further away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .partition import Partition, Range, merge, union


@dataclass(frozen=True)
class Window:
    """Windows along one dimension.

    Args:
        num_inputs: Places of the input.
        num_outputs: Places of the output.
        extent: Places from a window's first to its last, dilation included.
        stride: Places between the starts of two windows.
        padding: Places by which the first window starts before the input.

    """

    num_inputs: int
    num_outputs: int
    extent: int
    stride: int
    padding: int

    def start(self, output: int) -> int:
        """The first place that an output reads; negative in the padding."""
        return output * self.stride - self.padding


@dataclass(frozen=True)
class Span:
    """What some consecutive outputs read.

    Args:
        outputs: The outputs.
        inputs: Their inputs, without padding.
        before: Places of padding before these.
        after: Places of padding behind them.

    """

    outputs: Range
    inputs: Range
    before: int
    after: int

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return self.outputs[1] - self.outputs[0]


@dataclass(frozen=True)
class Reach:
    """One rank's part of a dimension that windows slide along.

    Args:
        held: The inputs that it holds.
        all: What all of its outputs read.
        first: Outputs before the interior.
        interior: Outputs that read nothing but what it holds; no padding either.
        last: Outputs behind the interior.

    """

    held: Range
    all: Span
    first: Span
    interior: Span
    last: Span

    def parts(self, inputs: Range) -> tuple[Range, Range, Range]:
        """A range of inputs as what lies before what is held, in it, and behind it, each relative to its own start."""
        start, stop = self.held
        before = _clip(inputs, 0, start)
        own = _clip(inputs, start, stop)
        behind = _clip(inputs, stop, inputs[1])
        first, last = self.fringes
        return _moved(before, first[0]), _moved(own, start), _moved(behind, last[0])

    @property
    def fringes(self) -> tuple[Range, Range]:
        """The inputs that it needs and other ranks hold: before its own, and behind."""
        start, stop = self.held
        return _clip(self.all.inputs, 0, start), _clip(self.all.inputs, stop, self.all.inputs[1])


def _clip(inputs: Range, start: int, stop: int) -> Range:
    low = max(inputs[0], start)
    return low, max(low, min(inputs[1], stop))


def _moved(inputs: Range, origin: int) -> Range:
    return (inputs[0] - origin, inputs[1] - origin) if inputs[1] > inputs[0] else (0, 0)


def _span(window: Window, start: int, stop: int) -> Span:
    if stop <= start:
        return Span((start, start), (0, 0), 0, 0)
    low, high = window.start(start), window.start(stop - 1) + window.extent
    first = min(max(low, 0), window.num_inputs)
    last = max(first, min(high, window.num_inputs))
    # Where a window lies wholly in the padding, all that it reads is padding, on either side.
    before = min(max(0, -low), high - low - (last - first))
    return Span((start, stop), (first, last), before, high - low - (last - first) - before)


@lru_cache(maxsize=4096)
def reach(window: Window, inputs: Partition, outputs: Partition, rank: int) -> Reach:
    """What one rank reads.

    Args:
        window: The windows.
        inputs: The places that each rank holds, one range a rank.
        outputs: The places that each rank computes, one range a rank.
        rank: Which rank.

    """
    held = inputs.ranges[rank][0] if inputs.ranges[rank] else (0, 0)
    start, stop = outputs.ranges[rank][0] if outputs.ranges[rank] else (0, 0)
    # The first output that starts within what is held, and the first that ends behind it.
    inside = min(max(start, -(-(held[0] + window.padding) // window.stride)), stop)
    beyond = (held[1] - window.extent + window.padding) // window.stride + 1
    beyond = max(inside, min(stop, beyond))
    return Reach(
        held,
        _span(window, start, stop),
        _span(window, start, inside),
        _span(window, inside, beyond),
        _span(window, beyond, stop),
    )


@lru_cache(maxsize=4096)
def fringe(window: Window, inputs: Partition, outputs: Partition) -> Partition:
    """What each rank needs of what others hold."""
    reaches = [reach(window, inputs, outputs, rank) for rank in range(inputs.num_ranks)]
    return Partition(inputs.size, tuple(tuple(merge(each.fringes)) for each in reaches))


@lru_cache(maxsize=4096)
def edges(held: Partition, need: Partition) -> Partition:
    """What each rank has to send, in ascending order."""
    sent = []
    for rank, ranges in enumerate(held.ranges):
        wanted = [
            (max(start, low), min(stop, high))
            for start, stop in ranges
            for peer, others in enumerate(need.ranges)
            if peer != rank
            for low, high in others
        ]
        sent.append(union(wanted))
    return Partition(held.size, tuple(sent))
