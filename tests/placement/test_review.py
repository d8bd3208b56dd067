"""What arbitrary training code does to split tensors: hooks, higher gradients, re-initialisation, keyword calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from squall.placement import Columns, Partition, place, plan_layout, unplace, whole_state_dict
from squall.placement.batches import BatchSupply, agree_on_batches, release_batches
from squall.placement.module import gather_part
from squall.placement.optimizers import wrap_step
from tests.ranks import run

from .parity import assert_close, compare_parameters, whole_grad, world_columns
from .test_rules import assert_local

SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat_axis": lambda x: torch.cat([x, x], axis=1),  # type: ignore[call-overload]
    "stack_axis": lambda x: torch.stack([x, x], axis=2),  # type: ignore[call-overload]
    "squeeze_axis": lambda x: x[:, :, :1, :1].squeeze(axis=2),  # type: ignore[call-overload]
    "unbind_axis": lambda x: torch.unbind(x, axis=2)[1],  # type: ignore[call-arg]
    "sum_input": lambda x: torch.sum(input=x, dim=2),
    "softmax_input": lambda x: torch.softmax(input=x, dim=2),
    "normalize_dims": lambda x: torch.nn.functional.normalize(x, dim=(2, 3)),  # type: ignore[arg-type]
    "permute_input": lambda x: torch.permute(input=x, dims=(0, 2, 3, 1)),
    "where_names": lambda x: torch.where(condition=x > 0, input=x, other=-x),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_calls_by_name(name: str) -> None:
    torch.manual_seed(0)
    full = torch.randn(3, 12, 4, 6, dtype=torch.float64)
    assert_local(full, 1, Partition.even(12, 2), SPELLINGS[name], must_split=True)


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip


def _both(build: Callable[[], nn.Sequential] = _net) -> tuple[nn.Sequential, nn.Sequential, Tensor, Columns]:
    torch.manual_seed(7)
    alone = build().double()
    inputs = torch.randn(3, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    placed = copy.deepcopy(alone)
    columns = world_columns()
    place(placed, plan_layout(placed, columns.num_columns), columns)
    return alone, placed, inputs, columns


def _compare_gradients(alone: nn.Module, placed: nn.Module) -> None:
    for (name, expected), actual in zip(alone.named_parameters(), placed.parameters(), strict=True):
        grad = whole_grad(actual)
        assert grad is not None
        assert expected.grad is not None
        assert_close(grad, expected.grad, name)


def initialise() -> None:
    alone, placed, _, _ = _both()
    for net in (alone, placed):
        torch.manual_seed(3)
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 0.3)
    compare_parameters(alone, placed)


def higher_gradients() -> None:
    alone, placed, x, _ = _both()
    for net in (alone, placed):
        hidden = checkpoint(net[:5], x, use_reentrant=False)
        (slope,) = torch.autograd.grad(hidden, x, grad_outputs=torch.ones_like(hidden), retain_graph=True)
        y = net[5:](net[:5](x))
        by_weight, by_input = torch.autograd.grad(y.sum(), [net[0].weight, x], create_graph=True)
        (slope.sum() + by_weight.square().sum() + by_input.square().sum() + y.square().sum()).backward()
    _compare_gradients(alone, placed)


def recomputed_gradients() -> None:
    alone, placed, x, _ = _both()
    results = []
    for net in (alone, placed):
        y = net[4:](checkpoint(net[1:4], net[0](x), use_reentrant=False))
        grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        results.append([gather_part(g, g._spec) if hasattr(g, "_spec") else g for g in grads])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, "gradient")


def clip() -> None:
    alone, placed, x, columns = _both()
    norms = []
    for net in (alone, placed):
        net(x).square().sum().backward()
        columns.ledger.start_step(1)
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
    torch.testing.assert_close(norms[1], norms[0])
    _compare_gradients(alone, placed)
    assert not columns.ledger.crossings, "whole gradients were sent"


def optimizer_hooks() -> None:
    alone, placed, x, _ = _both()
    for net in (alone, placed):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        wrap_step(optimizer)

        def normalise(optimizer: torch.optim.Optimizer, *_: object) -> None:
            with torch.no_grad():
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.div_(parameter.norm() + 1)

        optimizer.register_step_post_hook(normalise)
        net(x).square().sum().backward()
        optimizer.step()
    compare_parameters(alone, placed)  # and the running statistics of a forward pass outside of a step


def split_buffer() -> None:
    alone, placed, x, _ = _both()
    for net in (alone, placed):
        net.register_buffer("center", torch.zeros(7, dtype=torch.float64))
        net.center = net.center * 0.9 + net[0](x).mean((0, 2, 3)).detach()
    assert_close(whole_state_dict(placed)["center"], alone.center, "center")
    unplace(placed)
    assert type(placed.center) is Tensor


def written_to_out() -> None:
    alone, placed, x, _ = _both()
    results = []
    with torch.no_grad():
        for net in (alone, placed):
            out = torch.zeros(3, 7, 6, 6, dtype=torch.float64)
            torch.add(net[0](x), 1, out=out)
            results.append(out)
    assert_close(results[1], results[0], "out")


class _ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(torch.cat([y, y.relu()], 1))
        return out


def channels_last() -> None:
    alone, placed, x, _ = _both(lambda: nn.Sequential(_ChannelsLast(), nn.Conv2d(2, 2, 1)))
    for net in (alone, placed):
        net(x.to(memory_format=torch.channels_last)).square().sum().backward()
    _compare_gradients(alone, placed)


def _one_way() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 12, 3, groups=3), nn.Conv2d(12, 2, 1))


def crossings() -> list[str]:
    _, placed, x, columns = _both(_one_way)
    columns.ledger.start_step(3)
    placed(x)
    return [crossing.name for crossing in columns.ledger.crossings]


@pytest.mark.parametrize(
    "check",
    [
        initialise, higher_gradients, recomputed_gradients, clip, optimizer_hooks, split_buffer, written_to_out,
        channels_last,
    ],
)  # fmt: skip
def test_like_one_device(check: Callable[[], None]) -> None:
    run(2, check)


def test_all_ranks_list_the_same_crossings() -> None:
    """Also the one that only receives: they log them together."""
    names = run(2, crossings)
    assert names[0] == names[1] == ["1", "2"]


def test_loaders_are_given_back() -> None:
    loader = DataLoader([1, 2, 3])
    supply = BatchSupply(Columns(num_columns=2), torch.device("cpu"), "auto", lambda: None)
    agree_on_batches(loader, supply, 0)
    assert type(loader) is not DataLoader
    release_batches(loader)
    assert type(loader) is DataLoader
    assert [int(batch) for batch in loader] == [1, 2, 3]


def write_to_views() -> None:
    """What is written to a part of a split tensor is written to the tensor, as on one device."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(2, 2))
    placed = copy.deepcopy(alone)
    place(placed, plan_layout(placed, dist.get_world_size()), world_columns())
    for module in (alone, placed):
        weight, bias = module[0].weight, module[0].bias
        with torch.no_grad():
            weight[1:5].mul_(2)
            weight[1:5][0].add_(1)
            bias[0].zero_()
            weight.chunk(2, 0)[1].neg_()
            bias.view(2, 3)[1, :2] += 5
    compare_parameters(alone, placed)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_writes_to_views_are_not_lost(num_ranks: int) -> None:
    run(num_ranks, write_to_views)
