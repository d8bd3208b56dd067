"""What is recorded of a rank's step is what the Strategies' placement does, by their own ledgers and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from squall.conf.planner import steps
from squall.conf.planner.events import Compute, Ready, Send, Trace, Wait
from squall.models import VGGD, AlexNet, LeNet5
from squall.placement import Grid, derive_layout, derive_tiles, flops_per_example


def _alexnet() -> nn.Module:
    return AlexNet(num_classes=10, image_size=28, width=0.25, in_channels=1)


def _task(net: nn.Module, side: int = 28, channels: int = 1) -> steps.Task:
    return steps.Task(net, torch.zeros(1, channels, side, side))


def _flops(trace: Trace, phase: str) -> int:
    return sum(e.operation.flops for e in trace if isinstance(e, Compute) and e.phase == phase)


def _sent(trace: Trace, phase: str, collective: str) -> int:
    found = [e for e in trace if isinstance(e, Send) and (e.phase, e.collective) == (phase, collective)]
    return sum(e.num_bytes for e in found)


@pytest.mark.parametrize(
    ("net", "side", "channels"), [(_alexnet(), 28, 1), (LeNet5(), 28, 1), (VGGD(width=0.25), 32, 3)]
)
def test_flops_are_those_that_placement_counts(net: nn.Module, side: int, channels: int) -> None:
    trace = steps.single(_task(net, side, channels), 4)
    forward = 4 * sum(flops_per_example(net, torch.zeros(1, channels, side, side)).values())
    assert _flops(trace, "forward") == forward
    # Backward there are gradients of weights and of inputs, but for the image's.
    assert forward < _flops(trace, "backward") < 2 * forward
    assert _flops(trace, "update") == 0


def test_every_layer_has_its_work_in_each_phase() -> None:
    trace = steps.single(_task(_alexnet()), 2)
    for phase in ("forward", "backward"):
        layers = {e.layer for e in trace if isinstance(e, Compute) and e.phase == phase and e.operation.flops}
        assert layers == {"conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"}
    norms = {e.phase for e in trace if isinstance(e, Compute) and e.layer == "norm1"}
    assert norms == {"forward", "backward"}


def test_memory_is_what_a_rank_holds() -> None:
    net = _alexnet()
    num_bytes = 4 * sum(p.numel() for p in net.parameters())
    memory = steps.single(_task(net), 2).memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (num_bytes,) * 3
    assert 1.9 < steps.single(_task(net), 4).memory.activations / memory.activations < 2.1
    halves = steps.columns(_task(net), 2, 2).memory
    assert 0.49 < halves.weights / num_bytes < 0.52  # all but the last layer
    assert steps.zero1(_task(net), 2, 2).memory.optimizer < num_bytes


@pytest.mark.parametrize("num_columns", [2, 4])
def test_columns_send_what_the_layout_says(num_columns: int) -> None:
    net = _alexnet()
    layout = derive_layout(net, torch.zeros(1, 1, 28, 28), num_columns)
    floats = sum(row.floats_per_image or 0 for row in layout)
    trace = steps.columns(_task(net), 4, num_columns)
    assert 16 * floats <= _sent(trace, "forward", "pair") < 1.5 * 16 * floats  # where a rank receives more, that counts
    assert not any(isinstance(e, Send) and e.phase == "update" for e in trace)


def test_tiles_send_fringes_and_add_gradients_up() -> None:
    net = _alexnet()
    layout = derive_tiles(net, torch.zeros(1, 1, 28, 28), Grid.dry(2, 1))
    floats = sum(row.floats_per_image or 0 for row in layout) + sum(f for _, f in layout.other_floats_per_image)
    trace = steps.spatial(_task(net), 4, (2, 1))
    assert _sent(trace, "forward", "pair") == pytest.approx(16 * floats, rel=0.2)  # the busier of two uneven tiles
    tiled = sum(row.num_parameters for row in layout if row.split == "tiles")
    assert _sent(trace, "backward", "all_reduce") == 4 * tiled


def test_tiles_of_batch_normalisation_can_be_recorded() -> None:
    trace = steps.spatial(_task(VGGD(width=0.125), 32, 3), 4, (2, 1))
    assert _sent(trace, "forward", "all_reduce") > 0  # moments of all tiles


def test_replicas_send_every_gradient_once_while_they_go_back() -> None:
    net = AlexNet(num_classes=10, image_size=28, in_channels=1)
    trace = steps.ddp(_task(net), 2, 2)
    num_bytes = 4 * sum(p.numel() for p in net.parameters())
    sends = [e for e in trace if isinstance(e, Send)]
    assert sum(e.num_bytes for e in sends) == num_bytes
    assert len(sends) > 1
    events = list(trace)
    first, last = (
        events.index(sends[0]),
        max(at for at, e in enumerate(events) if isinstance(e, Compute) and e.phase == "backward"),
    )
    assert first < last  # the first bucket leaves before the backward pass is over
    assert all(events.index(Wait(e.number)) > last for e in sends)  # and is waited for after it


def test_buckets_are_full_at_their_sizes() -> None:
    operation = steps._copying(4)
    done = Compute(operation, "", "update")
    trace = steps.single(_task(LeNet5()), 1).with_events(
        [Ready(6, "a"), Ready(6, "b"), Ready(30, "c"), Ready(1, "d"), done]
    )
    sizes = [e.num_bytes for e in steps.in_buckets(trace, 2, first=10, size=20) if isinstance(e, Send)]
    assert sizes == [12, 30, 1]


@pytest.mark.parametrize("scheme", ["a", "b", "c"])
def test_hybrid_averages_convolutions_and_passes_activities_on(scheme: str) -> None:
    net = _alexnet()
    trace = steps.hybrid(_task(net), 4, 2, scheme)  # type: ignore[arg-type]
    convolutions = 4 * sum(p.numel() for name, p in net.named_parameters() if name.startswith("conv"))
    assert _sent(trace, "backward", "all_reduce") == convolutions
    inputs = sum(layer.in_features for layer in net.modules() if isinstance(layer, nn.Linear))
    outputs = sum(layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear))
    # To the other rank go this one's four examples, and half of the outputs of its four come back.
    least = 4 * 4 * (inputs + outputs // 2)
    assert _sent(trace, "forward", "pair") == (2 if scheme == "b" else 1) * least
    waits = [e for e in trace if isinstance(e, Wait)]
    assert len(waits) == len([e for e in trace if isinstance(e, Send)])


def test_replicas_of_columns_average_at_the_end() -> None:
    trace = steps.columns(_task(_alexnet()), 4, 2, num_replicas=3)
    averaged = [e for e in trace if isinstance(e, Send) and e.num_ranks == 3]
    assert averaged
    assert all(e.spans == 2 for e in averaged)
    assert sum(e.num_bytes for e in averaged) == trace.memory.gradients
