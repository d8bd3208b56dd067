"""What is due every so many steps of a run is due, though no rank sees them all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import squall
from squall._due import StepCount
from squall.consistency.progress import Progress
from tests.ranks import run
from tests.strategies.hogwild_programs import Hook, kill_me, run_alone, trainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.asynchronous]

NUM_BATCHES = 26


class Line(LightningModule):
    """A gradient of one, and a schedule that the test chooses."""

    def __init__(self, schedule: str = "", by_hand: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.schedule, self.automatic_optimization = schedule, not by_hand

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.weight.sum()
        if not self.automatic_optimization:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            # Rank 0 does every fourth time, the others always.
            if batch_idx % 4 == 3 or self.global_rank > 0:
                schedule.step()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.weight.detach()[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        if not self.schedule:
            return optimizer
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedulers = torch.optim.lr_scheduler
        made: Any = {
            "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, num_steps),
            "cycle": lambda: schedulers.OneCycleLR(optimizer, 0.5, num_steps),
            "halves": lambda: schedulers.ExponentialLR(optimizer, 0.5),
        }[self.schedule]()
        return [optimizer], [{"scheduler": made, "interval": "step"}]


def batches(num: int = NUM_BATCHES) -> DataLoader[Any]:
    return DataLoader(torch.zeros(num, 1), batch_size=1)


# ------------------------------------------------------------------ schedules


def test_what_a_checkpoint_has_of_a_later_epoch_is_counted_once() -> None:
    """The others were ahead: the queue hears of that epoch when somebody comes to it."""
    heard = [Progress(2, {1: 5, 2: 3})]
    count = StepCount(lambda: heard[-1], lambda: 10, lambda: 1)
    assert count() == 0
    for said, expected in (({1: 6}, 0), ({1: 9}, 1), ({1: 9, 2: 3}, 4), ({2: 4}, 6)):
        heard.append(Progress(max(said), said))
        assert count() == expected
    assert 10 + 5 + 3 + count() == heard[-1].num_steps(10, 1)


def _schedule(strategy: str, arguments: dict[str, Any], kind: str, options: dict[str, Any]) -> tuple[int, int, float]:
    module = Line(kind)
    made = {"downpour": squall.DownpourStrategy, "hogwild": squall.HogwildStrategy}[strategy](**arguments)
    fitter = trainer(".", made, max_epochs=2, **options)
    fitter.fit(module, batches())
    scheduler: Any = fitter.lr_scheduler_configs[0].scheduler
    return fitter.estimated_stepping_batches, scheduler.last_epoch, fitter.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "arguments", "options"),
    [
        ("downpour", {"push_every": 8, "fetch_every": 8}, {}),
        ("downpour", {}, {"accumulate_grad_batches": 4}),
        ("hogwild", {}, {"accumulate_grad_batches": 4}),
        ("downpour", {"push_every": 2, "fetch_every": 2}, {"max_steps": 11}),
    ],
    ids=str,
)
def test_schedules_come_to_their_end(
    num_ranks: int, strategy: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    for kind in ("cosine", "cycle"):
        for foretold, made, rate in run(num_ranks, _schedule, strategy, arguments, kind, options, lightning=True):
            assert made == foretold
            assert kind == "cycle" or rate == 0.0


class Rates(Callback):
    """Notes what this rank's own optimizer steps with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda *_: self.seen.append(optimizer.param_groups[0]["lr"]))


def _by_hand(strategy: str) -> tuple[float, list[float]]:
    rates = Rates()
    fitter = trainer(".", strategy, callbacks=[rates])
    fitter.fit(Line("halves", by_hand=True), batches())
    return fitter.optimizers[0].param_groups[0]["lr"], rates.seen


@pytest.mark.parametrize("strategy", ["downpour", "hogwild"])
def test_a_schedule_that_is_stepped_by_hand_is_rank_0s(strategy: str) -> None:
    ((rate, _),) = run(1, _by_hand, strategy, lightning=True)
    assert rate == 0.5 ** (1 + NUM_BATCHES // 4)
    (rate, leaders), (other, others) = run(2, _by_hand, strategy, lightning=True)
    assert rate == other
    if strategy == "hogwild":
        assert leaders, "its own optimizer steps"
        assert set(others) <= {0.5 ** (1 + number) for number in range(1 + NUM_BATCHES // 4)}
        assert min(others, default=1.0) >= rate, "and not as often as the other rank's own schedule was stepped"


# ------------------------------------------------------------------ validation


class Looks(Callback):
    """Notes after which batch each validation was, and what of it this rank knew at each of its batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.known: list[float | None] = []

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append((trainer.current_epoch, trainer.fit_loop.batch_idx))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        self.known.append(None if loss is None else float(loss))


def _validate(strategy: str, *callbacks: Callback, resume: str | None = None, **options: Any) -> Any:
    looks = Looks()
    fitter = trainer(".", strategy, callbacks=[looks, *callbacks], enable_checkpointing=bool(callbacks), **options)
    fitter.fit(Line(), batches(24), batches(2), ckpt_path=resume)
    return looks.seen, looks.known


@pytest.mark.parametrize("every_n_epoch", [1, 2, None])
@pytest.mark.parametrize("interval", [7, 0.25, 1.0])
def test_one_rank_validates_where_one_device_does(every_n_epoch: int | None, interval: float) -> None:
    if every_n_epoch is None and isinstance(interval, float):
        pytest.skip("Lightning wants a whole number there")
    options = {"val_check_interval": interval, "check_val_every_n_epoch": every_n_epoch, "max_epochs": 2}
    stock, _ = _validate("auto", accumulate_grad_batches=4, **options)
    for strategy in ("downpour", "hogwild"):
        ((ours, _),) = run(1, _validate, strategy, accumulate_grad_batches=4, lightning=True, **options)
        assert ours == stock


@pytest.mark.parametrize("interval", [24, 6, 0.25, 1.0])
def test_a_slow_leader_validates_in_every_epoch(interval: float) -> None:
    """The others do all but one batch of each epoch; of its own, the leader would wait for a sixth in vain."""
    held = squall.EventInjector().delay_at(0, 0, until_version=23)
    options = {"val_check_interval": interval, "max_epochs": 2}
    (seen, _), (others, _) = run(2, _validate, "downpour", held, lightning=True, **options)
    assert {epoch for epoch, _ in seen} == {0, 1}
    assert others == []


def test_batches_of_all_ranks_count_for_validation_and_all_hear_of_it() -> None:
    lockstep = squall.EventInjector()
    for step in range(12):
        lockstep.barrier_at([0, 1], step)
    (seen, _), (others, known) = run(2, _validate, "hogwild", lockstep, val_check_interval=6, lightning=True)
    assert len(seen) == 4
    assert others == []
    assert known[0] is None, "as on one device, before the first"
    assert known[-1] is not None
    assert known[-1] < 0


def _resumed(path: str) -> Any:
    keep = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False)
    options: dict[str, Any] = {"val_check_interval": 7, "max_epochs": 2}
    straight, _ = _validate("downpour", keep, **options)
    file = str(Path(path) / "step=14.ckpt")
    resumed, _ = _validate("downpour", resume=file, **options)
    return straight, resumed


def test_a_resumed_run_validates_where_it_would_have(tmp_path: Path) -> None:
    ((straight, resumed),) = run(1, _resumed, str(tmp_path), lightning=True)
    assert straight == [(0, 6), (0, 13), (0, 20), (1, 6), (1, 13), (1, 20)]
    assert resumed == straight[2:]


def _validate_after() -> list[Any]:
    looks = Looks()
    fitter = trainer(".", "downpour", callbacks=[looks])
    module = Line()
    fitter.fit(module, batches(8), batches(2))
    fitted = float(fitter.callback_metrics["val_loss"])
    with torch.no_grad():
        module.weight.fill_(3.0)
    (validated,) = fitter.validate(module, batches(2), verbose=False)
    return [fitted, validated["val_loss"], float(fitter.callback_metrics["val_loss"])]


def test_validate_after_fit_says_what_it_finds() -> None:
    first, other = run(2, _validate_after, lightning=True)
    assert first == other
    assert first[0] < 0
    assert first[1:] == [3.0, 3.0]


# ------------------------------------------------------------------ checkpoints, and the end


class Endless(IterableDataset[Any]):
    """Rank 0 has so many samples, the others others; None for no end."""

    def __init__(self, *num: int | None) -> None:
        self.num = num

    def __iter__(self) -> Iterator[Tensor]:
        num = self.num[min(int(os.environ["RANK"]), len(self.num) - 1)]
        return itertools.repeat(torch.zeros(1)) if num is None else iter(torch.zeros(num, 1))


def _save(path: str, num: tuple[int, int]) -> int:
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=sum(num), save_top_k=-1)
    fitter = trainer(path, "downpour", callbacks=[keep], enable_checkpointing=True)
    fitter.fit(Line(), DataLoader(Endless(*num), batch_size=1))
    return fitter.global_step


def test_a_step_that_others_make_last_is_saved(tmp_path: Path) -> None:
    assert run(2, _save, str(tmp_path), (4, 20), lightning=True) == [24, 24]
    saved = torch.load(tmp_path / "step=24.ckpt", weights_only=True)
    assert saved["global_step"] == 24
    assert torch.equal(saved["state_dict"]["weight"], torch.full((3,), -24 * 0.5))


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.fit_loop.batch_idx == 5:
            trainer.should_stop = True


@pytest.mark.parametrize("strategy", ["downpour", "hogwild"])
def test_who_has_endless_data_stops_when_rank_0_does(strategy: str) -> None:
    steps = run(2, _endless, strategy, lightning=True, timeout=40)
    assert steps[0] == steps[1] >= 6


def _endless(strategy: str) -> int:
    fitter = trainer(".", strategy, callbacks=[Stops()])
    fitter.fit(Line(), DataLoader(Endless(None), batch_size=1))
    return fitter.global_step


def _endless_without_leader(path: str) -> None:
    callbacks = [Hook(kill_me, 5)] if os.environ["RANK"] == "0" else []
    trainer(path, "downpour", callbacks=callbacks).fit(Line(), DataLoader(Endless(None), batch_size=1))


def test_who_has_endless_data_hears_that_rank_0_is_lost(tmp_path: Path) -> None:
    _, (kind, message) = run_alone(2, _endless_without_leader, tmp_path, timeout=60)
    assert kind == "error"
    assert "Rank 0 is gone" in message
    assert list(tmp_path.glob("rank0-lost-step=*.ckpt"))
