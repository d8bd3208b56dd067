"""Steps that can be played by hand, and what messages take."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.alternatives import Alternative
from squall.conf.planner.clusters import Cluster, sizes_of
from squall.conf.planner.devices import Device, device_of
from squall.conf.planner.events import Compute, Memory, Operation, Send, Trace, Wait
from squall.conf.planner.links import Link, Network, link_of
from squall.conf.planner.predictions import overhead
from squall.conf.planner.timeline import play

DEVICE = Device("a second a byte", flops=1.0, bandwidth=1.0)


def _network(**options: float) -> Network:
    link = Link("a second a byte", bandwidth=1.0, latency=0.0, **options)  # type: ignore[arg-type]
    return Network(1, 2, link, link)


def _trace(*events: object) -> Trace:
    return Trace(tuple(events), Memory(), 1)  # type: ignore[arg-type]


def _compute(seconds: int, layer: str = "a") -> Compute:
    return Compute(Operation(f"{seconds}", "memory", 0, seconds), layer, "forward")


def _send(number: int, seconds: int) -> Send:
    return Send(number, "pair", seconds, 2, "b", "forward")


@pytest.mark.parametrize(
    ("events", "seconds", "waiting"),
    [
        ([_compute(3), _send(1, 2), Wait(1)], 5.0, 2.0),  # nothing hides it
        ([_send(1, 2), _compute(3), Wait(1)], 3.0, 0.0),  # all of it is hidden
        ([_send(1, 5), _compute(3), Wait(1)], 5.0, 2.0),  # what is left is waited for
        ([_send(1, 2), _send(2, 4), _compute(3), Wait(2)], 6.0, 3.0),  # one after the other
        ([_send(1, 2), _send(2, 4), Wait(1), _compute(3), Wait(2)], 6.0, 3.0),
        ([_compute(1), _send(1, 4)], 5.0, 4.0),  # a step ends when all has been sent
    ],
)
def test_messages_hide_behind_what_computes(events: list[object], seconds: float, waiting: float) -> None:
    line = play(_trace(*events), DEVICE, _network())
    assert line.seconds == pytest.approx(seconds)
    assert sum(line.waiting.values()) == pytest.approx(waiting)
    assert sum(line.computing.values()) + waiting == pytest.approx(seconds)


def test_a_core_that_carries_messages_computes_less() -> None:
    events = [_send(1, 2), _compute(3), Wait(1)]
    # Half of the core for two seconds: one second of the three is done, two are left.
    assert play(_trace(*events), DEVICE, _network(cpu_share=0.5)).seconds == pytest.approx(4.0)
    # The message takes four of them then.
    assert play(_trace(*events), DEVICE, _network(cpu_share=0.5, slowdown=2.0)).seconds == pytest.approx(5.0)


def test_layers_have_their_part() -> None:
    line = play(_trace(_compute(3, "a"), _send(1, 2), Wait(1), _compute(1, "b")), DEVICE, _network())
    assert line.by_layer() == {"a": (3.0, 0.0), "b": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("collective", "num_ranks", "seconds"),
    [
        ("pair", 2, 11.0),
        ("broadcast", 4, 12.0),
        ("all_gather", 4, 10.5),
        ("all_reduce", 2, 12.0),  # 2 turns, 2 x 1/2 of the bytes
        ("all_reduce", 4, 21.0),  # 6 turns in a ring and 15 s, against 4 in a tree and 20 s
        ("all_reduce", 64, 32.0),  # a tree: 12 turns, 20 s
        ("pair", 1, 0.0),
    ],
)
def test_collectives(collective: str, num_ranks: int, seconds: float) -> None:
    assert Link("", bandwidth=1.0, latency=1.0).seconds(collective, 10, num_ranks) == pytest.approx(seconds)


def test_machines_share_their_link_and_add_up_inside_first() -> None:
    network = Network(4, 8, Link("inside", 100.0, 0.0), Link("between", 1.0, 0.0))
    inside = Send(1, "all_reduce", 100, 8, "", "backward")
    assert network.seconds(inside) == pytest.approx(1.75)
    everywhere = Send(1, "all_reduce", 100, 32, "", "backward")
    assert network.seconds(everywhere) == pytest.approx(1.75 + 150.0)
    # One rank of each machine and replica: all eight such groups are under way at once.
    parts = Send(1, "all_reduce", 100, 4, "", "backward", spans=8)
    assert network.seconds(parts) == pytest.approx(8 * 150.0)


def test_rooflines() -> None:
    device = Device("", flops=100.0, bandwidth=10.0, efficiency={"gemm": 0.5, "conv": 0.25}, overhead=1.0)
    assert device.seconds(Operation("", "gemm", 100, 1)) == pytest.approx(3.0)
    assert device.seconds(Operation("", "conv", 100, 1)) == pytest.approx(5.0)
    assert device.seconds(Operation("", "gemm", 100, 100)) == pytest.approx(11.0)  # memory bounds it
    known = Device("", 100.0, 10.0, measured={"this": 7.0}, factor=2.0)
    assert known.seconds(Operation("this", "gemm", 100, 1)) == pytest.approx(14.0)
    trace = _trace(_compute(30), _compute(20))
    assert device.scaled_to(trace, 3.5).step_seconds(trace) == pytest.approx(3.5)


def test_what_a_strategy_adds_to_another_is_by_message_or_push() -> None:
    overheads = {"single": 0.01, "ddp": 0.1, "columns": 1.0, "hybrid": 10.0, "downpour": 8.0}
    cluster = Cluster("", DEVICE, _network(), overheads=overheads)
    trace = _trace(_compute(1), _compute(1), _compute(1), _send(1, 1), Wait(1), _send(2, 1))
    options = {"hybrid": {"scheme": "c"}, "downpour": {"push_every": 4}}
    seconds = {
        s: overhead(Alternative(s, 2, options=options.get(s, {})), trace, cluster) for s in ("spatial", *overheads)
    }
    expected = {"spatial": 0.0, "single": 0.03, "ddp": 0.3, "columns": 3.0, "hybrid": 20.3, "downpour": 2.03}
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "sizes"), [(4, [4]), ("1..1", [1]), ("1..6", [1, 2, 4, 6]), ("3..24", [3, 6, 12, 24])]
)
def test_ranges_of_machines(asked: int | str, sizes: list[int]) -> None:
    assert sizes_of(asked) == sizes


@pytest.mark.parametrize("asked", ["0", "4..2", "-1", "many", "1..", 0])
def test_ranges_that_are_none(asked: int | str) -> None:
    with pytest.raises(MisconfigurationException, match="num_nodes"):
        sizes_of(asked)


def test_what_is_wrong_with_a_file_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"none of .*25gbit"):
        link_of("26gbit")
    with pytest.raises(MisconfigurationException, match="latency_us is missing"):
        link_of({"gbit": 1})
    with pytest.raises(MisconfigurationException, match="speed is not known"):
        link_of({"gbit": 1, "latency_us": 1, "speed": 2})
    with pytest.raises(MisconfigurationException, match="tflops is missing"):
        device_of({"name": "x", "memory_bandwidth_gb": 1})
    with pytest.raises(MisconfigurationException, match=r"flops=0\.0 must be positive"):
        device_of({"name": "x", "tflops": 0, "memory_bandwidth_gb": 1})
    with pytest.raises(MisconfigurationException, match="efficiency has fft"):
        device_of({"name": "x", "tflops": 1, "memory_bandwidth_gb": 1, "efficiency": {"fft": 1}})
