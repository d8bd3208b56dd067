"""Loss scaling in half precision: columns skip a step together, or take it together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from squall.placement import place, plan_layout
from tests.ranks import run

from .parity import world_columns


def scaled_step(overflow_on: int) -> tuple[bool, float]:
    """Whether this rank took the step, and its scale afterwards."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    place(net, plan_layout(net, 2), world_columns())
    weight = net[0].weight
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler.scale(net(torch.ones(1, 4)).sum()).backward()
    if dist.get_rank() == overflow_on:
        weight.grad = torch.full((4, 4), float("inf"))
    before = str(weight)
    scaler.step(optimizer)
    scaler.update()
    return str(weight) != before, scaler.get_scale()


def test_an_overflow_on_one_column_skips_the_step_on_all() -> None:
    assert run(2, scaled_step, 1) == [(False, 4.0)] * 2
    assert run(2, scaled_step, -1) == [(True, 16.0)] * 2
