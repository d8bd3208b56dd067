"""Downpour under a Trainer, against closed forms: every number below can be worked out by hand."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import squall
from tests.ranks import free_port, run

pytestmark = pytest.mark.asynchronous

LR = 0.125  # a power of two, like all gradients here: sums of them are exact in any order
START = 8.0


class Constant(LightningModule):
    """A loss whose gradient is 1 for the first vector's elements and -2 for the second's, whatever the weights are."""

    def __init__(self, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.full((7, 3), START)), nn.Parameter(torch.full((5,), START))
        self.optimizer, self.options = optimizer, {"lr": LR, **options}
        self.register_buffer("rank_seen", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rank_seen.fill_(float(self.global_rank + 1))
        return self.up.sum() - 2 * self.down.sum()

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)


def rows(num: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(num).float()), batch_size=1)


def trainer(strategy: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": int(os.environ.get("WORLD_SIZE", "1")), "max_epochs": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(strategy=strategy, **{**defaults, **options})


def fit(module: LightningModule, strategy: Any, loader: Any = None, **options: Any) -> Trainer:
    made = trainer(strategy, **options)
    made.fit(module, rows() if loader is None else loader)
    return made


def _constant(options: dict[str, Any]) -> dict[str, Any]:
    module = Constant()
    strategy = squall.DownpourStrategy(**options)
    made = fit(module, strategy)
    return {
        "up": module.up.detach().clone(),
        "down": module.down.detach().clone(),
        "steps": made.global_step,
        "report": dict(strategy.report),
    }


def _one_port_after_the_other(ports: list[int]) -> list[int]:
    steps = []
    for port in ports:
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE="2")  # Lightning takes the size away after a fit
        steps.append(fit(Constant(), "downpour").global_step)
    return steps


def test_a_port_may_be_used_again_by_another_job() -> None:
    """Whoever counts runs by their port alone waits for one that has been."""
    one, other = free_port(), free_port()
    for seen in run(2, _one_port_after_the_other, [one, other, one, one], lightning=True, timeout=60):
        assert seen == [24] * 4


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_shards": 3}, {"overlap": True}, {"fetch_every": 3}, {"max_staleness": 1}, {"warm_start_steps": 5}],
    ids=str,
)
def test_every_push_is_applied_once(num_ranks: int, options: dict[str, Any]) -> None:
    for seen in run(num_ranks, _constant, options, lightning=True):
        assert seen["steps"] == seen["report"]["version"] == seen["report"]["num_samples"] == 24
        assert sum(count for _, count in seen["report"]["staleness"]) == 24
        assert torch.equal(seen["up"], torch.full((7, 3), START - 24 * LR))
        assert torch.equal(seen["down"], torch.full((5,), START + 24 * 2 * LR))


def test_others_begin_with_what_the_warm_start_has_made() -> None:
    for seen in run(3, _constant, {"warm_start_steps": 20}, lightning=True):
        counts = dict(seen["report"]["staleness"])
        assert counts[0] >= 20
        assert max(counts) < 24 - 20, "nobody's gradient may come from the weights that it waited with"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_of_gradients_are_pushed(num_ranks: int) -> None:
    for seen in run(num_ranks, _constant, {"push_every": 5}, lightning=True):
        assert torch.equal(seen["up"], torch.full((7, 3), START - 24 * LR)), "each gradient counts once"
        assert seen["report"]["num_samples"] == 24
        assert seen["report"]["version"] < 24


@pytest.mark.parametrize("codec", ["bf16", "int8", "1bit", "topk:1.0"])
def test_codecs_lose_nothing_of_gradients_that_they_can_say(codec: str) -> None:
    for seen in run(2, _constant, {"codec": codec}, lightning=True):
        torch.testing.assert_close(seen["up"], torch.full((7, 3), START - 24 * LR), rtol=1e-6, atol=0)
        torch.testing.assert_close(seen["down"], torch.full((5,), START + 24 * 2 * LR), rtol=1e-6, atol=0)


def _adagrad() -> Tensor:
    module = Constant("Adagrad", eps=0.0)
    fit(module, squall.DownpourStrategy(num_shards=2))
    return module.down.detach().clone()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adagrad_of_the_paper(num_ranks: int) -> None:
    """``w -= lr g / sqrt(n g g)`` for n = 1, 2, ...: the accumulator includes the gradient itself."""
    expected = START + LR * sum(n**-0.5 for n in range(1, 25))
    for seen in run(num_ranks, _adagrad, lightning=True):
        torch.testing.assert_close(seen, torch.full((5,), expected), rtol=1e-5, atol=0)


def _max_steps(max_steps: int) -> tuple[int, Tensor]:
    module = Constant()
    made = fit(module, "downpour", max_steps=max_steps, max_epochs=-1)
    return made.global_step, module.up.detach().clone()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_max_steps_counts_everybodys_updates(num_ranks: int) -> None:
    for steps, up in run(num_ranks, _max_steps, 37, lightning=True):
        assert steps == 37
        assert torch.equal(up, torch.full((7, 3), START - 37 * LR))


class Quadratic(Constant):
    """A gradient that shows which weights it was computed from: ``w - target of the batch``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.up - batch[0]).square().sum()


def _quadratic(options: dict[str, Any], delay: int) -> tuple[Tensor, Tensor, list[Any]]:
    module = Quadratic()
    strategy = squall.DownpourStrategy(**options)
    fit(module, strategy)
    past = [torch.full((7, 3), START)]
    for number in range(24):
        base = past[max(number - delay, 0)]
        past.append(past[-1] - LR * (base - number))
    return module.up.detach(), past[-1], strategy.report["staleness"]


@pytest.mark.parametrize(
    ("options", "delay", "staleness"),
    [
        ({}, 0, [[0, 24]]),
        ({"overlap": True}, 1, [[0, 1], [1, 23]]),
        ({"fetch_every": 4}, 0, [[0, 6], [1, 6], [2, 6], [3, 6]]),
        ({"push_every": 4, "fetch_every": 4}, 0, [[0, 6]]),
    ],
    ids=str,
)
def test_one_worker_computes_with_the_weights_it_should(
    options: dict[str, Any], delay: int, staleness: list[Any]
) -> None:
    """Local steps of plain SGD are the shards' own; overlap means weights that miss exactly the last update."""
    ((up, expected, seen),) = run(1, _quadratic, options, delay, lightning=True)
    torch.testing.assert_close(up, expected, rtol=1e-5, atol=1e-6)
    assert [list(pair) for pair in seen] == staleness


class Stepped(Constant):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _schedule() -> tuple[float, Tensor]:
    module = Stepped()
    made = fit(module, squall.DownpourStrategy(max_staleness=0))
    return float(made.optimizers[0].param_groups[0]["lr"]), module.up.detach().clone()


def test_schedules_count_updates() -> None:
    ((_, alone),) = run(1, _schedule, lightning=True)
    assert torch.equal(alone, torch.full((7, 3), START - LR * 6 * (1 + 0.5 + 0.25 + 0.125)))
    for rate, up in run(2, _schedule, lightning=True):
        assert rate in (LR / 8, LR / 16), "a quarter of the rates if each rank counted its own steps"
        assert abs(up[0, 0] - alone[0, 0]) <= 2 * LR  # the leader hears of others' updates at its own steps


def _buffers() -> list[float]:
    module = Constant()
    fit(module, squall.DownpourStrategy(max_staleness=0))
    return module.rank_seen.tolist()


def test_buffers_are_averaged() -> None:
    assert run(1, _buffers, lightning=True) == [[1.0, 1.0]]
    assert run(2, _buffers, lightning=True) == [[1.5, 1.5]] * 2


def _interrupted(path: str, codec: str, num_shards: tuple[int, int, int]) -> tuple[Tensor, Tensor, list[Any]]:
    """Train for two epochs; then again, broken off in the second one and resumed, perhaps on other shards."""

    def downpour(run: int) -> squall.DownpourStrategy:
        return squall.DownpourStrategy(num_shards=num_shards[run], codec=codec)

    class Shuffled(Quadratic):
        pass

    def loader() -> Any:
        torch.manual_seed(3)
        return DataLoader(TensorDataset(torch.arange(24).float()), batch_size=1, shuffle=True)

    straight, resumed = Shuffled("Adam"), Shuffled("Adam")
    torch.manual_seed(5)
    fit(straight, downpour(0), loader(), max_epochs=2)
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=31, save_top_k=-1)
    torch.manual_seed(5)
    fit(
        Shuffled("Adam"), downpour(1), loader(), max_epochs=2, enable_checkpointing=True,
        callbacks=[keep],
    )  # fmt: skip
    strategy = downpour(2)
    made = trainer(strategy, max_epochs=2)
    made.fit(resumed, loader(), ckpt_path=Path(path) / "step=31.ckpt", weights_only=True)
    return straight.up.detach(), resumed.up.detach(), [made.global_step, strategy.report["num_samples"]]


@pytest.mark.parametrize(
    ("codec", "num_shards"),
    [("fp32", (1, 2, 3)), ("1bit", (2, 2, 2)), ("topk:0.2", (1, 1, 1))],  # a code's blocks are cut as shards are
)
def test_a_resumed_run_is_the_run(tmp_path: Path, codec: str, num_shards: tuple[int, int, int]) -> None:
    ((straight, resumed, counts),) = run(1, _interrupted, str(tmp_path), codec, num_shards, lightning=True)
    torch.testing.assert_close(straight, resumed, rtol=1e-6, atol=0)  # vector units round a slice's tail otherwise
    assert counts == [48, 48 - 31]


def _resumed_after_the_end(path: str, codec: str) -> tuple[Tensor, Tensor, list[Any]]:
    """As above, but the first run has one epoch, and is saved after its end."""
    straight, first, resumed = Quadratic("Adam"), Quadratic("Adam"), Quadratic("Adam")
    loader = rows()
    fit(straight, squall.DownpourStrategy(codec=codec), loader, max_epochs=2)
    ended = fit(first, squall.DownpourStrategy(codec=codec), loader)
    ended.save_checkpoint(Path(path) / "end.ckpt")
    strategy = squall.DownpourStrategy(codec=codec)
    made = trainer(strategy, max_epochs=2)
    made.fit(resumed, loader, ckpt_path=Path(path) / "end.ckpt", weights_only=True)
    return straight.up.detach(), resumed.up.detach(), [made.global_step, strategy.report["num_samples"]]


@pytest.mark.parametrize("codec", ["fp32", "1bit", "topk:0.2"])
def test_a_run_that_is_saved_after_its_end_can_be_resumed(tmp_path: Path, codec: str) -> None:
    """With what its codes have lost."""
    ((straight, resumed, counts),) = run(1, _resumed_after_the_end, str(tmp_path), codec, lightning=True)
    torch.testing.assert_close(straight, resumed, rtol=1e-6, atol=0)
    assert counts == [48, 24]


class _Edits(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.up.fill_(100.0)  # type: ignore[operator, union-attr]


def _edited() -> Tensor:
    module = Constant()
    fit(module, squall.DownpourStrategy(num_shards=2), max_epochs=2, callbacks=[_Edits()])
    return module.up.detach().clone()


def test_edits_between_steps_are_kept() -> None:
    ((up,)) = run(1, _edited, lightning=True)
    assert torch.equal(up, torch.full((7, 3), 100.0 - 24 * LR))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_every": 0}, "push_every=0"),
        ({"fetch_every": 1.5}, "fetch_every=1.5"),
        ({"num_shards": "many"}, "num_shards='many'"),
        ({"max_staleness": -1}, "max_staleness=-1"),
        ({"staleness_rule": "hope"}, "staleness_rule='hope'"),
        ({"codec": "gzip"}, "codec"),
        ({"warm_start_steps": True}, "warm_start_steps=True"),
        ({"lease_timeout": 0}, "lease_timeout=0"),
        ({"lease_timeout": "30"}, "lease_timeout='30' must be a number of seconds"),
        ({"lease_timeout": float("inf")}, "lease_timeout=inf"),
        ({"lease_timeout": float("nan")}, "lease_timeout=nan"),
        ({"join_timeout": "x"}, "join_timeout='x' must be a number of seconds"),
        ({"join_timeout": None}, "join_timeout=None"),
        ({"overlap": "no"}, "overlap='no' must be True or False"),
        ({"codec": 5}, "codec=5 must be one of"),
        ({"schedule": 5}, "schedule: it is no list. Give it what strategy.events"),
        ({"schedule": [["foo", 0]]}, "schedule: event 0 is of kind 'foo'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        squall.DownpourStrategy(**options)


def test_a_schedule_of_more_ranks_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"events of rank 2, but the ranks .* Give the Trainer 3 dev"):
        fit(Constant(), squall.DownpourStrategy(schedule=[["lease", 0], ["lease", 2]]), devices=1)


class Validated(Quadratic):
    """What validation sees decides the rate, and is written into the weights; so are other ranks' losses."""

    def __init__(self, slow: int) -> None:
        super().__init__()
        self.slow = slow
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        threading.Event().wait(0.005 * (self.global_rank == self.slow))
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss.detach(), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.up.sum().item() + self.rank_seen.sum().item())

    def on_validation_end(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = LR / (1 + abs(self.seen[-1]))
        with torch.no_grad():
            self.down.fill_(float(self.trainer.callback_metrics["mean"]))


def _validated(slow: int, schedule: Any) -> tuple[Any, ...]:
    module = Validated(slow)
    strategy = squall.DownpourStrategy(schedule=schedule)
    made = trainer(strategy, val_check_interval=2, num_sanity_val_steps=0)
    made.fit(module, rows(), rows(1))
    return module.up.detach().clone(), module.down.detach().clone(), module.seen, strategy.events


def test_what_validation_leads_to_is_repeated() -> None:
    first, _ = run(2, _validated, 0, None, lightning=True)
    assert ["snapshot", 0] in first[3]
    assert ["write", 0] in first[3]
    again, _ = run(2, _validated, 1, first[3], lightning=True)
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    assert again[2] == first[2]


@pytest.mark.parametrize(
    "script",
    [
        squall.EventInjector().fail_at(5, 1),
        squall.EventInjector().delay_at(5, 0, until_version=1),
        squall.EventInjector().barrier_at([0, 5], 1),
    ],
    ids=str,
)
def test_a_script_of_ranks_that_are_not_there_is_refused(script: Callback) -> None:
    with pytest.raises(MisconfigurationException, match=r"events of rank 5, but .* are 0 to 0: .*Give the Trainer 6 d"):
        fit(Constant(), "downpour", devices=1, callbacks=[script])


def test_a_script_is_of_asynchronous_runs() -> None:
    with pytest.raises(MisconfigurationException, match='Use Trainer\\(strategy="downpour"\\)'):
        fit(Constant(), "auto", devices=1, callbacks=[squall.EventInjector()])


def test_a_failure_that_does_not_come_is_spoken_of() -> None:
    with pytest.warns(UserWarning, match=r"fail_at\(0, 24\) did not happen: rank 0 had only 24 batches"):
        fit(Constant(), "downpour", devices=1, callbacks=[squall.EventInjector().fail_at(0, 24)])
