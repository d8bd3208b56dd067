"""Linear layers in columns over ranks with examples of their own compute what one device does, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from squall import models
from squall.placement import ColumnParameter, place, whole_state_dict
from squall.placement.hybrid.layout import plan_hybrid
from squall.placement.hybrid.linear import ExampleColumns
from squall.placement.hybrid.schemes import Scheme, deal_passes
from tests.ranks import run

from .parity import assert_close, whole_grad


class Uneven(nn.Module):
    """Odd widths, a layer that runs twice, one without a bias, one over several places of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.places = nn.Linear(5, 7)
        self.shared = nn.Linear(7, 7, bias=False)
        self.last = nn.Linear(7 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(torch.tanh(self.conv(x)), 2).flatten(2).transpose(1, 2)
        x = self.shared(torch.tanh(self.shared(self.places(x))))
        return self.last(x.flatten(1)) + 0.1 * self.shared.weight.square().sum()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "uneven": (Uneven, (3, 9, 8)),
    "alexnet": (partial(models.AlexNet, 10, 32, width=0.125, dropout=0.0), (3, 32, 32)),
    "vgg16": (partial(models.VGG16, 10, 32, width=0.125, dropout=0.0), (3, 32, 32)),
}


def _columns(scheme: Scheme) -> ExampleColumns:
    group = dist.new_group()
    return ExampleColumns(group, dist.get_rank(), dist.get_world_size(), scheme)


def _loss(output: Tensor) -> Tensor:
    weights = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(3))
    return (torch.tanh(output) * weights).sum(1).mean()


def _penalized(output: Tensor, x: Tensor) -> Tensor:
    """The loss, and a penalty on the gradients of its inputs."""
    loss = _loss(output)
    (grad,) = torch.autograd.grad(loss * len(output), x, create_graph=True)
    return loss + (grad.flatten(1).norm(dim=1) - 1).square().mean()


def _check(
    build: Callable[[], nn.Module], shape: tuple[int, ...], scheme: Scheme, sizes: list[int], penalty: bool = False
) -> list[Any]:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(7)
        alone = build()
        torch.manual_seed(11)
        everything = torch.randn(sum(sizes), *shape)
        placed, columns = copy.deepcopy(alone), _columns(scheme)
        if columns.num_columns > 1:
            place(placed, plan_hybrid(placed, columns.num_columns), columns)
        columns.start_step(sizes[columns.rank])
        x = everything.clone().requires_grad_()
        inputs = x.split(sizes)
        parts = [alone(part) for part in inputs]
        losses = [_penalized(*pair) if penalty else _loss(pair[0]) for pair in zip(parts, inputs, strict=True)]
        torch.stack(losses).mean().backward()

        own = everything.split(sizes)[columns.rank].clone().requires_grad_()
        output = placed(own)
        assert type(output) is Tensor
        (_penalized(output, own) if penalty else _loss(output)).backward()
        assert own.grad is not None
        assert x.grad is not None
        assert_close(output.detach(), parts[columns.rank].detach(), "output")
        # Of this rank's loss; the mean over ranks has 1/K of it.
        assert_close(own.grad / len(sizes), x.grad.split(sizes)[columns.rank], "gradient of the input")
        expected = dict(alone.named_parameters())
        for name, parameter in placed.named_parameters():
            grad = whole_grad(parameter)
            assert grad is not None
            if not isinstance(parameter, ColumnParameter):
                dist.all_reduce(grad)
                grad /= len(sizes)
            assert_close(grad, expected[name].grad, f"gradient of {name}")
        for name, value in whole_state_dict(placed).items():
            assert torch.equal(value, alone.state_dict()[name])
        return columns.timeline
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["a", "b", "c"])
@pytest.mark.parametrize("name", NETS)
def test_parity(name: str, scheme: Scheme, num_ranks: int) -> None:
    run(num_ranks, _check, *NETS[name], scheme, [4] * num_ranks)


@pytest.mark.parametrize("scheme", ["a", "b", "c"])
def test_ranks_with_other_numbers_of_examples(scheme: Scheme) -> None:
    """Fewer examples than passes on one rank, and more on another."""
    run(4, _check, *NETS["uneven"], scheme, [5, 1, 3, 2])


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 3, 2]])
@pytest.mark.parametrize("scheme", ["a", "c"])
def test_gradients_of_gradients(scheme: Scheme, sizes: list[int]) -> None:
    run(len(sizes), _check, *NETS["uneven"], scheme, sizes, penalty=True)


@pytest.mark.parametrize(("scheme", "num_passes"), [("a", 1), ("b", 4), ("c", 4)])
def test_the_next_pass_travels_while_one_computes(scheme: Scheme, num_passes: int) -> None:
    """Of each layer, in both directions: pass k + 1 is on its way before pass k begins to compute."""
    for timeline in run(4, _check, *NETS["alexnet"], scheme, [4] * 4):
        for layer in ("fc6", "fc7", "fc8"):
            for backward in (False, True):
                events = [event for event in timeline if (event.layer, event.backward) == (layer, backward)]
                start = {(event.what, event.number): event.start for event in events}
                stop = {(event.what, event.number): event.stop for event in events}
                assert sorted(start) == sorted(
                    (w, n) for w in ("fetch", "compute", "return") for n in range(num_passes)
                )
                for number in range(num_passes - 1):
                    assert start["fetch", number + 1] < start["compute", number]
                    assert stop["fetch", number + 1] > stop["compute", number]
                    assert stop["return", number] > stop["compute", num_passes - 1]  # nobody waits for it before


def _diverge() -> str:
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    place(net, plan_hybrid(net, 2), _columns("c"))
    with pytest.raises(RuntimeError, match="all ranks must run the same fully connected layers") as caught:
        net["one" if dist.get_rank() else "two"](torch.zeros(2, 4))
    return str(caught.value)


def test_ranks_at_other_layers_are_told() -> None:
    first, second = run(2, _diverge)
    assert "at the forward pass of two, and another one is not" in first
    assert "layout={'one': 'whole'}" in second


def test_passes_of_each_scheme() -> None:
    assert deal_passes("a", [3, 2]) == [((0, 3), (0, 2))]
    assert deal_passes("b", [3, 0]) == [((0, 3), (0, 0))]
    assert deal_passes("c", [3, 1]) == [((0, 2), (0, 1)), ((2, 3), (0, 0))]


def test_the_table_says_up_to_where_columns_pay() -> None:
    with torch.device("meta"):
        table = plan_hybrid(models.AlexNet(), 2, {"fc7": "whole"})
    reasons = {row.name: (row.split, row.reason) for row in table}
    assert reasons["conv3"] == ("whole", "replicated: 885,120 gradients a step, however many examples")
    assert reasons["fc6"] == ("columns", "B(m + n) < 2mn up to 5,671 examples a step")
    assert reasons["fc7"] == ("whole", "by layout")


@pytest.mark.parametrize(
    ("net", "overrides", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {}, "Sequential has no linear layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 1)), {}, "Sequential has no linear layer"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {}, "trains nothing but linear layers.*column_parallel"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), {"0": "columns"}, "only linear layers"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), {"fc6": "whole"}, "no layer of the module"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), {"1": "whole"}, "but for those that layout keeps whole"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyLinear(4)), {}, "1 has uninitialized parameters"),
    ],
)
def test_layouts_that_cannot_be(net: nn.Module, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        plan_hybrid(net, 2, overrides)
