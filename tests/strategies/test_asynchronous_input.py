"""What users hand to ranks that don't wait, and what must not be ignored: it works, or is refused, or warned of."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

import squall
from squall.consistency.order import Order
from tests.ranks import run

from .test_downpour import LR, Constant, fit, rows, trainer

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


# ------------------------------------------------------------------ data


class Uneven(Dataset[Any]):
    """Every other batch takes longer than the next."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> int:
        if index // 4 % 2 == 0:
            time.sleep(0.05)
        return index


class Ticketed(Constant):
    def on_fit_start(self) -> None:
        self.mismatched: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        position = self.trainer.strategy._tickets[-1][1]
        if batch.tolist() != list(range(4 * position, 4 * position + 4)):
            self.mismatched.append((position, batch.tolist()))
        return super().training_step(batch, batch_idx)


def _out_of_order(strategy: str) -> list[Any]:
    # Data loaders start processes, which a pool's daemon may not do; they end with the loader.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    module = Ticketed()
    with pytest.warns(UserWarning, match="in_order=False"):
        fit(module, strategy, DataLoader(Uneven(), batch_size=4, num_workers=2, in_order=False))
    return module.mismatched


@BOTH
def test_batches_are_told_apart_though_workers_finish_in_any_order(strategy: str) -> None:
    assert run(1, _out_of_order, strategy, lightning=True) == [[]]


class Share(Sampler[int]):
    """Each rank's own part of the samples, as under DDP with ``use_distributed_sampler=False``."""

    def __init__(self, num: int, in_shares: bool) -> None:
        self.indices = range(int(os.environ["RANK"]), num, 2) if in_shares else range(num)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _shared(strategy: str, sampler: str) -> Any:
    data = rows(24).dataset
    if sampler == "torch's":
        split: Any = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)  # type: ignore[arg-type]
    else:
        split = Share(24, sampler == "in shares")
    try:
        made = fit(Constant(), strategy, DataLoader(data, sampler=split), use_distributed_sampler=False)
    except MisconfigurationException as error:
        return str(error)
    return made.strategy.report["num_samples"]


@BOTH
def test_a_sampler_that_deals_out_shares_is_refused_or_made_whole(strategy: str) -> None:
    assert run(2, _shared, strategy, "torch's", lightning=True) == [24, 24]
    assert run(2, _shared, strategy, "whole", lightning=True) == [24, 24]
    for said in run(2, _shared, strategy, "in shares", lightning=True):
        assert said.startswith("The ranks' samplers list different samples")


# ------------------------------------------------------------------ resumed in the middle of an epoch


class Seen(Constant):
    def on_fit_start(self) -> None:
        self.samples: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.samples += batch[0].long().tolist()
        return super().training_step(batch, batch_idx)


def _first(path: str) -> Path:
    return min(Path(path).glob("*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))


def _begun(path: str, strategy: str, limit: Any) -> list[int]:
    """Train on an epoch, and say which samples the first checkpoint in it has; a slow rank 0 may not wait for long."""
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=5, save_top_k=-1)
    data = DataLoader(rows(24).dataset, batch_size=2, shuffle=True)
    made: Any = squall.DownpourStrategy(max_staleness=0) if strategy == "downpour" else strategy
    fit(Seen(), made, data, callbacks=[keep], enable_checkpointing=True, limit_train_batches=limit)
    if int(os.environ["RANK"]) > 0:
        return []
    state = torch.load(_first(path), weights_only=True)["squall_asynchronous"]["queue"]["0"]
    order = Order.from_state(state)
    return [index for position, done in enumerate(order.done) if done for index in order.batch(position)]


def _continued(path: str, strategy: str, batch_size: int, limit: Any, num: int) -> Any:
    module = Seen()
    made = trainer(strategy, limit_train_batches=limit)
    made.fit(module, DataLoader(rows(num).dataset, batch_size=batch_size, shuffle=True), ckpt_path=_first(path))
    return module.samples, made.strategy.report["num_samples"], made.global_step


@BOTH
@pytest.mark.parametrize("batch_size", [1, 2, 4, 12])
def test_an_epoch_goes_on_in_batches_of_another_size(tmp_path: Path, strategy: str, batch_size: int) -> None:
    (done,) = run(1, _begun, str(tmp_path), strategy, 1.0, lightning=True)
    assert len(done) == 10
    ((samples, num, steps),) = run(1, _continued, str(tmp_path), strategy, batch_size, 1.0, 24, lightning=True)
    assert sorted(done + samples) == list(range(24))
    assert (num, steps) == (14, 5 + -(-14 // batch_size))


def test_an_epoch_of_limited_batches_goes_on_on_fewer_ranks(tmp_path: Path) -> None:
    done = run(2, _begun, str(tmp_path), "downpour", 6, lightning=True)[0]
    assert 10 <= len(done) < 24
    ((samples, num, _),) = run(1, _continued, str(tmp_path), "downpour", 2, 6, 24, lightning=True)
    assert sorted(done + samples) == list(range(24))
    assert num == 24 - len(done)


def test_an_epoch_over_other_data_begins_anew(tmp_path: Path) -> None:
    run(1, _begun, str(tmp_path), "downpour", 1.0, lightning=True)
    ((samples, num, _),) = run(1, _continued, str(tmp_path), "downpour", 2, 1.0, 22, lightning=True)
    assert sorted(samples) == list(range(22))
    assert num == 22
