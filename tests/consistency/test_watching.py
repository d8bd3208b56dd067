"""Who may have edited parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from squall.consistency.watching import EditWatch


@pytest.fixture
def watched() -> Iterator[tuple[EditWatch, nn.Parameter]]:
    parameter = nn.Parameter(torch.ones(3))
    watch = EditWatch([parameter])
    watch.begin()
    watch.begin()
    watch.reset()
    yield watch, parameter
    watch.end()
    watch.end()
    assert "data" not in vars(nn.Parameter)


def _assign(parameter: nn.Parameter) -> None:
    parameter.data = torch.zeros(3)


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.data.clamp_(-0.5, 0.5),
        lambda p: p.data[0].fill_(2.0),
        lambda p: p.detach().mul_(2),
        lambda p: p.detach().view(3, 1)[1].zero_(),
        lambda p: torch._foreach_mul_([p], 2),
        lambda p: nn.utils.vector_to_parameters(torch.zeros(3), [p]),
        lambda p: nn.init.uniform_(p),
        lambda p: torch.optim.SGD([p], lr=0.1).step(lambda: p.sum().backward()),
        _assign,
    ],
)
def test_edits_are_noticed(watched: tuple[EditWatch, nn.Parameter], edit: Callable[[nn.Parameter], object]) -> None:
    watch, parameter = watched
    before = parameter.detach().clone()
    with torch.no_grad(), torch.enable_grad() if "optim" in str(edit.__code__.co_names) else torch.no_grad():
        edit(parameter)
    assert not torch.equal(before, parameter)
    assert watch.may_be_edited()
    watch.reset()
    assert not watch.may_be_edited()


@pytest.mark.parametrize(
    "look",
    [
        lambda p: (2 * p).sum().backward(),
        lambda p: p.detach().norm(),
        lambda p: torch.equal(p, p),
        lambda p: nn.Parameter(torch.ones(2)).data.zero_(),
        str,
    ],
)
def test_who_only_looks_is_not_taken_for_an_editor(
    watched: tuple[EditWatch, nn.Parameter], look: Callable[[nn.Parameter], object]
) -> None:
    watch, parameter = watched
    look(parameter)
    assert not watch.may_be_edited()


def test_parameters_are_used_as_ever(watched: tuple[EditWatch, nn.Parameter]) -> None:
    _, parameter = watched
    assert type(parameter.data) is Tensor
    assert torch.equal(copy.deepcopy(parameter), parameter)
    module = nn.Linear(2, 2)
    module.double()
    assert module.weight.data.dtype == torch.float64


def test_who_does_not_watch_has_to_look() -> None:
    watch = EditWatch([nn.Parameter(torch.ones(1))])
    watch.reset()
    assert watch.may_be_edited()
