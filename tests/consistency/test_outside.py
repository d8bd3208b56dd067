"""Optimizers that keep something where a shard would not find it: refused by name, before anything begins."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from squall.consistency.optimizers import try_state


class Plain(Optimizer):
    """Keeps nothing; what kinds below keep, they note in ``_note``."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.names, self.config, self.rates = ["a"], SimpleNamespace(power=2), torch.ones(2)

    def _note(self) -> None:
        pass

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._note()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class Counts(Plain):
    time = 0

    def _note(self) -> None:
        self.time += 1


class CountsInItsGroup(Plain):
    def _note(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


class CountsInItsState(Plain):
    def _note(self) -> None:
        self.state["step"] = self.state.get("step", 0) + 1  # type: ignore[call-overload, index]


class Appends(Plain):
    def _note(self) -> None:
        self.names.append("b")


class Sets(Plain):
    def _note(self) -> None:
        self.config.power += 1


class Scales(Plain):
    def _note(self) -> None:
        self.rates.mul_(0.5)


class Lookahead(Optimizer):
    """Wrapped around another one, as it is usually written."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.defaults = base, base.defaults
        self.param_groups, self.state = base.param_groups, defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        self.base.step()


class HoldsParameters(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.slow = {"weights": [nn.Parameter(torch.ones(2))]}


class HoldsAModule(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.teacher = SimpleNamespace(net=nn.Linear(2, 2))


class HoldsItself(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.update = self._note


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Counts, r"Counts\.step\(\) changes its attribute 'time'"),
        (CountsInItsGroup, r"CountsInItsGroup\.step\(\) changes 'step' of its param_groups"),
        (CountsInItsState, r"CountsInItsState\.step\(\) changes its state\['step'\]"),
        (Appends, r"Appends\.step\(\) changes its attribute 'names'"),
        (Sets, r"Sets\.step\(\) changes its attribute 'config'"),
        (Scales, r"Scales\.step\(\) changes its attribute 'rates'"),
        (lambda params: Lookahead(torch.optim.SGD(params, lr=0.1)), r"Lookahead holds an optimizer \(SGD\) .* 'base'"),
        (HoldsParameters, "HoldsParameters holds a Parameter in its attribute 'slow'"),
        (HoldsAModule, r"HoldsAModule holds a module's parameters \(Linear\) in its attribute 'teacher'"),
        (HoldsItself, r"HoldsItself holds an optimizer \(HoldsItself\) in its attribute 'update'"),
    ],
)
def test_what_a_shard_would_not_find_is_refused(make: Any, says: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make([parameter])
    before = {key: repr(value) for key, value in vars(optimizer).items()}
    with pytest.raises(MisconfigurationException, match=says):
        try_state(optimizer, optimizer.param_groups[0], (5,), torch.float32)
    assert before == {key: repr(value) for key, value in vars(optimizer).items()}, "it was a trial"


def test_what_stays_as_it_is_may_be_kept_anywhere() -> None:
    optimizer = Plain([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert try_state(optimizer, optimizer.param_groups[0], (5,), torch.float32) == []


def test_ranks_that_step_their_own_may_count_for_themselves() -> None:
    optimizer = Counts([nn.Parameter(torch.ones(2))])
    assert try_state(optimizer, optimizer.param_groups[0], (5,), torch.float32, at_shard=False) == []
