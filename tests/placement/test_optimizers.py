"""Which optimizers may step on parts of a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from squall.placement.optimizers import is_elementwise


class Sign(Optimizer):
    """Every element alone."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.factor(parameter) * parameter.grad.sign(), alpha=group["lr"])

    def factor(self, parameter: torch.Tensor) -> Any:
        return 1.0


class Trusting(Sign):
    """By the ratio of norms, but for small gradients."""

    def factor(self, parameter: torch.Tensor) -> Any:
        assert parameter.grad is not None
        return (parameter.norm() / parameter.grad.norm()).clamp(max=0.1)


class Clipping(Sign):
    """Of large gradients the norm counts."""

    def factor(self, parameter: torch.Tensor) -> Any:
        assert parameter.grad is not None
        return (100 / parameter.grad.norm()).clamp(max=1.0)


class Lookahead(Optimizer):
    """Steps by another one."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(torch.optim.Adam, True), (Sign, True), (Trusting, False), (Clipping, False), (torch.optim.LBFGS, False)],
)
def test_what_norms_count_in_needs_whole_parameters(optimizer: Any, expected: bool) -> None:
    assert is_elementwise(optimizer([nn.Parameter(torch.ones(3))])) == expected


def test_an_optimizer_in_another_is_not_tried() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    assert not is_elementwise(Lookahead(Sign([parameter])))
    assert parameter.equal(torch.ones(3))
