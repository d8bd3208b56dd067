"""Collectives of the ranks that live, where one of them was silent for too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import squall
from squall.consistency.client import RevokedError
from tests.ranks import run

from .test_downpour import Constant, fit


def test_who_was_given_up_before_the_loop_comes_again_to_where_the_others_wait() -> None:
    said: list[str] = []

    def meet(key: str, kind: str, value: Any) -> dict[int, Any]:
        said.append(key)
        if said.count(key) == 1:
            raise RevokedError
        return {0: "theirs", 1: value}

    strategy = squall.DownpourStrategy()
    strategy._client = SimpleNamespace(meet=meet, greet=lambda: said.append("hello"))  # type: ignore[assignment]
    assert strategy._meet("digest", "mine") == {0: "theirs", 1: "mine"}
    place = said[0]
    assert said == [place, "hello", place], "the same meeting, and not the next at this place"


class _Elsewhere(Constant):
    """Calls collectives on other lines on rank 0 than on the others, as ``if rank == 0`` makes users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if self.global_rank == 0:
            strategy.barrier()
            self.heard.append(strategy.broadcast("before"))
        else:
            strategy.barrier("of another name")
            self.heard.append(strategy.broadcast(None))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        if self.global_rank == 0:
            strategy.broadcast("within")
        else:
            self.heard.append(strategy.broadcast(None))
        return super().training_step(batch, batch_idx)


def _elsewhere() -> list[Any]:
    module = _Elsewhere()
    fit(module, squall.DownpourStrategy(warm_start_steps=2))  # which the others wait for
    return module.heard


@pytest.mark.asynchronous
def test_ranks_may_call_collectives_on_lines_of_their_own() -> None:
    leader, other = run(2, _elsewhere, lightning=True, timeout=60)
    assert leader == ["before"]
    assert other[0] == "before"
    assert set(other[1:]) == {"within"}


class _Gathering(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gathered = self.all_gather(batch[0])
        assert gathered.shape[1:] == batch[0].shape
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _gather() -> int:
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(14).float()), batch_size=4)  # 4, 4, 4, 2
    return fit(_Gathering(), "downpour", loader, max_epochs=4).global_step


@pytest.mark.asynchronous
def test_a_last_batch_that_is_smaller_can_be_gathered() -> None:
    assert run(2, _gather, lightning=True, timeout=60) == [16, 16]


class _Rows(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(12).float())


class _Noting(Constant):
    """Notes how many updates it has seen at its first step."""

    first = -1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.first < 0:
            self.first = (8.0 - float(self.up.flatten()[0].detach())) / 0.125
        return super().training_step(batch, batch_idx)


def _warm_up(name: str) -> float:
    module = _Noting()
    strategy = getattr(squall, name)(warm_start_steps=8)
    loader: DataLoader[Any] = DataLoader(_Rows(), batch_size=1)
    fit(module, strategy, loader)
    return module.first


@pytest.mark.asynchronous
@pytest.mark.parametrize("name", ["DownpourStrategy", "HogwildStrategy"])
def test_a_warm_start_is_waited_for_where_nothing_is_dealt_out(name: str) -> None:
    leader, other = run(2, _warm_up, name, lightning=True, timeout=60)
    assert leader == 0
    assert other >= (8 if name == "DownpourStrategy" else 7), "Hogwild counts an update, and makes it then"
