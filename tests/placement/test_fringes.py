"""Random stacks of convolutions and pooling in tiles, what windows reach, and when messages travel."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from squall.placement import Partition, make_grid, place_tiles, plan_tiles
from squall.placement.reach import Window, fringe, reach
from tests.ranks import run

from .parity import check, world_columns

Layer = tuple[str, tuple[Any, ...], dict[str, Any]]


def sides(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    options: dict[str, Any] = {"kernel_size": draw(sides(1, 5)), "dilation": draw(sides(1, 3))}
    if draw(st.booleans()):
        options["padding"] = "same"
    else:
        options |= {"padding": draw(sides(0, 4)), "stride": draw(sides(1, 4))}
    return "Conv2d", (4, 4), {**options, "groups": draw(st.sampled_from([1, 2, 4])), "bias": draw(st.booleans())}


@st.composite
def pools(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(["MaxPool2d", "AvgPool2d"]))
    kernel = draw(sides(1, 4))
    options = {
        "stride": draw(st.none() | sides(1, 4)),
        "padding": tuple(draw(st.integers(0, size // 2)) for size in kernel),
        "ceil_mode": draw(st.booleans()),
    }
    if kind == "MaxPool2d":
        options["dilation"] = draw(sides(1, 2))
    else:
        options["count_include_pad"] = draw(st.booleans())
    return kind, (kernel,), options


@st.composite
def adaptive_pools(draw: st.DrawFn) -> Layer:
    return draw(st.sampled_from(["AdaptiveAvgPool2d", "AdaptiveMaxPool2d"])), (draw(sides(1, 6)),), {}


stacks = st.lists(convolutions() | pools() | adaptive_pools(), min_size=1, max_size=4)


def build(stack: list[Layer]) -> nn.Module:
    # Smooth and uneven in between, or gradients would vanish or tie.
    layers = [[getattr(nn, kind)(*args, **options), nn.Softsign()] for kind, args, options in stack]
    return nn.Sequential(nn.Conv2d(2, 4, 1), *itertools.chain.from_iterable(layers))


def check_stack(stack: list[Layer], shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    check(partial(build, stack), shape, tiles=grid)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_random_stacks(grid: tuple[int, int]) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(stack=stacks, size=sides(4, 23))
    def equal_to_one_device(stack: list[Layer], size: tuple[int, int]) -> None:
        shape = (2, 2, *size)
        try:
            output = build(stack)(torch.zeros(shape))
        except RuntimeError:  # no window fits
            assume(False)
        assume(output.numel())
        run(grid[0] * grid[1], check_stack, stack, shape, grid)

    equal_to_one_device()


@given(
    st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 8), st.integers(0, 8), st.integers(1, 7)
)
def test_reach_covers_every_window_once(
    size: int, extent: int, stride: int, before: int, behind: int, num_ranks: int
) -> None:
    num_outputs = (size + before + behind - extent) // stride + 1
    assume(num_outputs > 0)
    window = Window(size, num_outputs, extent, stride, before)
    inputs, outputs = Partition.even(size, num_ranks), Partition.even(num_outputs, num_ranks)
    need = fringe(window, inputs, outputs)
    made = []
    for rank in range(num_ranks):
        along = reach(window, inputs, outputs, rank)
        held = set(itertools.chain(*(range(*piece) for piece in inputs.ranges[rank])))
        fetched = set(itertools.chain(*(range(*piece) for piece in need.ranges[rank])))
        assert not held & fetched
        for span in (along.first, along.interior, along.last):
            made += range(*span.outputs)
            if not span.num_outputs:
                continue
            places = range(window.start(span.outputs[0]), window.start(span.outputs[1] - 1) + extent)
            read = [place for place in places if 0 <= place < size]
            assert read == list(range(*span.inputs))
            assert span.before + len(read) + span.after == len(places)
            assert set(read) <= (held if span is along.interior else held | fetched)
            assert span is not along.interior or span.before == span.after == 0
    assert made == list(range(num_outputs))


class Watch(TorchDispatchMode):
    """Notes convolutions as they run, forward and backward."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            self.events.append(f"{name} {args[1 if name.endswith('backward') else 0].shape[2]}")
        return func(*args, **(kwargs or {}))


def watched(tiles: tuple[int, int], events: list[str]) -> Tensor:
    """One convolution, forward and backward, on every rank."""
    from squall.placement import fringes

    def noting(name: str, end: str, start: Any) -> Any:
        def begin(*args: Any) -> Any:
            events.append(name)
            finish = start(*args)

            def wait(*rest: Any) -> Any:
                events.append(end)
                return finish(*rest)

            return wait

        return begin

    before = fringes.start_fetch, fringes.start_home
    fringes.start_fetch = noting("send", "receive", before[0])
    fringes.start_home = noting("send home", "come home", before[1])
    try:
        net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
        grid = make_grid(world_columns(), *tiles, 1, "cpu")
        place_tiles(net, plan_tiles(net, grid), grid)
        image = torch.ones(1, 1, 16, 16, requires_grad=True)
        with Watch(events):
            net(image).sum().backward()
    finally:
        fringes.start_fetch, fringes.start_home = before
    return image


def events_of(tiles: tuple[int, int]) -> list[str]:
    events: list[str] = []
    watched(tiles, events)
    return events


def test_fringes_travel_while_the_interior_computes() -> None:
    """Of 8 rows a rank has 6 in the interior, and one at either side, whose windows read 3 with padding or fringe."""
    forward = ["send", "convolution 8", "receive", "convolution 3", "convolution 3"]
    backward = [
        "convolution_backward 3", "convolution_backward 3", "send home", "convolution_backward 8", "come home",
    ]  # fmt: skip
    for events in run(2, events_of, (2, 1)):
        assert events == forward + backward


def test_both_fringes_of_squares_travel_while_something_computes() -> None:
    for events in run(4, events_of, (2, 2)):
        for start, end in (("send", "receive"), ("send home", "come home")):
            begins = [place for place, event in enumerate(events) if event == start]
            ends = [place for place, event in enumerate(events) if event == end]
            assert len(begins) == len(ends) == 2
            for begin, stop in zip(begins, ends, strict=True):
                assert any(event.startswith("convolution") for event in events[begin:stop]), events
