"""What users hand to ranks that don't wait, and what must not be ignored: it works, or is refused, or warned of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.ranks import run

from .test_downpour import LR, Constant, fit, rows

pytestmark = [pytest.mark.asynchronous, pytest.mark.filterwarnings("ignore")]
BOTH = pytest.mark.parametrize("strategy", ["downpour", "hogwild"])


# ------------------------------------------------------------------ optimizers


class Twice(Constant):
    def configure_optimizers(self) -> Any:
        self.automatic_optimization = False
        return torch.optim.SGD(self.parameters(), lr=LR), torch.optim.Adam([self.down], lr=LR)


@BOTH
def test_a_parameter_has_one_optimizer(strategy: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"shape \(5,\) is given to two optimizers \(SGD and Adam\)"):
        fit(Twice(), strategy, devices=1)


class Hooked(Constant):
    """An optimizer's hooks halve its gradients, and note the weights after each step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        self.automatic_optimization = False  # or hooks before a step come before its gradients, too
        optimizer = super().configure_optimizers()
        self.seen: list[float] = []
        optimizer.register_step_pre_hook(self._halve)
        optimizer.register_step_post_hook(lambda *_: self.seen.append(self.up[0, 0].item()))
        return optimizer

    def _halve(self, *_: Any) -> None:
        assert self.up.grad is not None
        self.up.grad.mul_(0.5)


def _hooked(strategy: str) -> tuple[Tensor, list[float]]:
    module = Hooked()
    fit(module, strategy)
    return module.up.detach().clone(), module.seen


@pytest.mark.parametrize("strategy", ["auto", "downpour", "hogwild"])
def test_hooks_of_an_optimizer_are_called(strategy: str) -> None:
    ((up, seen),) = run(1, _hooked, strategy, lightning=True)
    assert seen == [8.0 - LR / 2 * number for number in range(1, 25)]
    assert torch.equal(up, torch.full((7, 3), 8.0 - 12 * LR))


def test_every_rank_has_its_steps_hooks_called() -> None:
    ends = run(2, _hooked, "downpour", lightning=True)
    assert sum(len(seen) for _, seen in ends) == 24
    for up, _ in ends:
        assert torch.equal(up, torch.full((7, 3), 8.0 - 12 * LR))


# ------------------------------------------------------------------ layers


class Normalised(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.norm(batch[0][:, None]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def _synchronised(strategy: str) -> str:
    loader = DataLoader(rows(24).dataset, batch_size=4)
    try:
        fit(Normalised(), strategy, loader, sync_batchnorm=True)
    except MisconfigurationException as error:
        return str(error)
    return ""


@BOTH
def test_batches_of_ranks_that_dont_wait_cant_be_normalised_together(strategy: str) -> None:
    assert run(1, _synchronised, strategy, lightning=True) == [""]
    for said in run(2, _synchronised, strategy, lightning=True):
        assert said.startswith("sync_batchnorm=True: norm can't normalise")
