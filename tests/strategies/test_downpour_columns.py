"""Columns inside Downpour's replicas: to all others a replica is one worker, and it computes what one device does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import SumMetric

import squall
from squall.placement.tensor import SplitParameter, local_view
from tests.ranks import run

from .fault_programs import Start, poll
from .test_downpour_faults import check, is_stopped, lockstep

pytestmark = pytest.mark.asynchronous


class Net(LightningModule):
    """Uneven columns, running statistics, a dropout mask, a parameter that is no layer's, and one transposed layer."""

    def __init__(self, optimizer: str = "SGD", dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 3, 2), nn.ReLU(),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * 5 * 5, 7),
        ).double()  # fmt: skip
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.seen = SumMetric()
        self.optimizer, self.options = optimizer, options
        self.validated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.scale * self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.seen.update(len(x))
        self.log("loss", nn.functional.cross_entropy(self.scale * self.net(x), y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.seen.compute()))
        self.seen.reset()

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.optimizer)(self.parameters(), **{"lr": 0.05, **self.options})
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def images(num: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num, 2, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(7, (num,), generator=generator))


def trainer(strategy: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": int(os.environ.get("WORLD_SIZE", "1")), "max_epochs": 2, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(strategy=strategy, **{**defaults, **options})


def whole(module: LightningModule) -> dict[str, Tensor]:
    assert not any(isinstance(parameter, SplitParameter) for parameter in module.parameters())
    return {key: value.clone() for key, value in module.state_dict().items()}


def check_equal(seen: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    for key, value in alone.items():
        assert torch.allclose(seen[key], value, rtol=0, atol=1e-10), key


def _trained(
    strategy: str | dict[str, Any], optimizer: tuple[str, dict[str, Any]], ckpt: str = "", **options: Any
) -> tuple[Net, Trainer]:
    module = Net(optimizer[0], **optimizer[1])
    fitter = trainer(strategy if isinstance(strategy, str) else squall.DownpourStrategy(**strategy), **options)
    torch.manual_seed(3)
    loaders = DataLoader(images(), batch_size=4), DataLoader(images(10), batch_size=5)
    fitter.fit(module, *loaders, ckpt_path=ckpt or None, weights_only=False)
    return module, fitter


class Shapes(Callback):
    """What a rank holds in the middle of training."""

    def __init__(self) -> None:
        self.local: dict[str, tuple[int, ...]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        with local_view():
            self.local = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _compared(num_columns: int, strategy: dict[str, Any], optimizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    shapes = Shapes()
    made = {"num_columns": num_columns, **strategy}
    module, fitter = _trained(made, optimizer, callbacks=[shapes], **options)
    return {
        "weights": whole(module), "local": shapes.local, "validated": module.validated, "steps": fitter.global_step,
        "state": fitter.strategy.optimizers[0].state_dict() if fitter.optimizers else None,
        
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_columns", "strategy", "optimizer", "options"),
    [
        (2, {}, ("SGD", {"dropout": 0.3}), {}),
        (2, {"num_shards": 3, "staleness_rule": "delay_compensated"}, ("Adam", {}), {"gradient_clip_val": 0.1}),
        (2, {"max_staleness": 1}, ("SGD", {"momentum": 0.9}), {"accumulate_grad_batches": 2}),
        (3, {}, ("SGD", {}), {"max_epochs": 1}),
    ],
    ids=str,
)
def test_one_replica_in_columns_is_one_device(
    num_columns: int, strategy: dict[str, Any], optimizer: Any, options: dict[str, Any]
) -> None:
    alone, fitter = _trained("auto", optimizer, devices=1, **options)
    for seen in run(num_columns, _compared, num_columns, strategy, optimizer, options, lightning=True):
        check_equal(seen["weights"], alone.state_dict())
        assert seen["steps"] == fitter.global_step
        assert seen["validated"] == alone.validated, "the columns of a replica validate the same samples"
        assert seen["local"]["net.7.weight"] == (7, 75), "the last layer is whole, on every rank"
    parts = [seen["local"] for seen in run(num_columns, _compared, num_columns, {}, ("SGD", {}), {}, lightning=True)]
    for name in ("net.0.weight", "net.1.weight", "net.3.weight"):
        assert sum(torch.Size(part[name]).numel() for part in parts) == alone.get_parameter(name).numel(), name


class Counts(LightningModule):
    """Weights that count, each output for itself, how often each sample was trained on; and all updates."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.seen = nn.Conv2d(num, 5, 1)
        self.last = nn.Linear(1, 1)  # stays whole, as last layers do, and has no gradient
        self.updates = nn.Parameter(torch.zeros(3))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.seen(batch).sum() - self.updates.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def _counted(options: dict[str, Any]) -> dict[str, Any]:
    module = Counts(24)
    strategy = squall.DownpourStrategy(num_columns=2, **options)
    fitter = trainer(strategy, max_epochs=3)
    fitter.fit(module, DataLoader(torch.eye(24).view(24, 24, 1, 1), batch_size=2, shuffle=True))
    assert strategy.layout is not None
    assert [row.split for row in strategy.layout if row.name == "seen"] == ["columns"]
    return {"weights": whole(module), "steps": fitter.global_step, "report": dict(strategy.report)}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_shards": 2, "overlap": True}, {"fetch_every": 3, "push_every": 2}, {"warm_start_steps": 9}],
    ids=str,
)
def test_every_sample_counts_once_in_every_column(options: dict[str, Any]) -> None:
    for seen in run(4, _counted, options, lightning=True):
        report, weights = seen["report"], seen["weights"]
        assert weights["seen.weight"].eq(3).all(), weights["seen.weight"]
        assert weights["seen.bias"].eq(3 * 24).all()
        assert report["num_samples"] == 3 * 24
        assert seen["steps"] == report["version"] == sum(count for _, count in report["staleness"])
        assert report["num_live"] == 2, "a replica is one worker"
        if "push_every" not in options:
            assert weights["updates"].eq(3 * 12).all(), "what is whole is pushed by one rank of a replica"


def _checkpointed(folder: str, optimizer: Any) -> Any:
    saves = ModelCheckpoint(folder, "at-{step}", every_n_train_steps=4, save_top_k=-1)
    module, _ = _trained({"num_columns": 2}, optimizer, callbacks=[saves], enable_checkpointing=True)
    return whole(module)


def _resumed(path: str, num_columns: int, optimizer: Any) -> Any:
    module, fitter = _trained({"num_columns": num_columns}, optimizer, path)
    return whole(module), fitter.global_step


@pytest.mark.parametrize("name", ["Adam", "Adafactor"])
def test_checkpoints_are_plain_and_go_on_under_any_number_of_columns(tmp_path: Path, name: str) -> None:
    optimizer: Any = (name, {})
    alone, _ = _trained("auto", optimizer, devices=1)
    state = alone.state_dict()

    def check_weights(weights: dict[str, Tensor]) -> None:
        for key, value in state.items():
            assert torch.allclose(weights[key], value, rtol=0, atol=1e-10), key

    for weights in run(2, _checkpointed, str(tmp_path), optimizer, lightning=True):
        check_weights(weights)
    path = tmp_path / "at-step=4.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert {k: v.shape for k, v in checkpoint["state_dict"].items()} == {k: v.shape for k, v in state.items()}
    assert all(type(value) is Tensor for value in checkpoint["state_dict"].values())
    entries = checkpoint["optimizer_states"][0]["state"]
    assert len(entries) == len(list(alone.parameters()))
    if name == "Adam":
        assert [entries[i]["exp_avg"].shape for i in range(len(entries))] == [p.shape for p in alone.parameters()]
    Net().load_state_dict(checkpoint["state_dict"])
    for num_columns in (1, 2):
        for weights, steps in run(num_columns, _resumed, str(path), num_columns, optimizer, lightning=True):
            assert steps == 12
            check_weights(weights)
    stock, fitter = _trained("auto", optimizer, str(tmp_path / "at-step=12.ckpt"), devices=1)
    assert fitter.global_step == 12
    check_weights(stock.state_dict())


class Drawn(Dataset[Any]):
    """Data that no generator of torch's governs, so that each process has another; all of it moves weights far."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6, 1, 1), float(1000 + os.getpid() % 1000 + index))


class Sees(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.last = nn.Conv2d(6, 4, 1), nn.Linear(4, 1)
        self.batches: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.last(self.layer(batch).flatten(1)).sum() * 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        self.layer.weight.clamp_(-0.5, 0.5)
        self.trainer.strategy.broadcast("one of them says something", src=1)


def _drawn() -> Any:
    module = Sees()
    trainer("downpour" if os.environ["WORLD_SIZE"] == "1" else squall.DownpourStrategy(num_columns=2)).fit(
        module, DataLoader(Drawn(), batch_size=2)
    )
    return module.batches, whole(module)


def test_columns_see_one_batch_and_their_edits_are_kept() -> None:
    (first, weights), (second, others) = run(2, _drawn, lightning=True)
    assert len(first) == 8
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert weights["layer.weight"].abs().max() == 0.5, "the last edit was of the last weights"
    assert all(torch.equal(weights[key], others[key]) for key in weights)


class Halves(Callback):
    """Gives parameters other memory, as code does that swaps averages in."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if index == 1:
            for parameter in module.parameters():
                parameter.data = parameter.data * 0.5


def _halved(num_columns: int) -> dict[str, Tensor]:
    module, _ = _trained({"num_columns": num_columns}, ("SGD", {}), callbacks=[Halves()])
    return whole(module)


def test_parameters_in_other_memory_go_on_from_there() -> None:
    alone = run(1, _halved, 1, lightning=True)[0]
    for seen in run(2, _halved, 2, lightning=True):
        check_equal(seen, alone)


class ByHand(Net):
    """Steps within its step, when running statistics are older than that."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def _by_hand(num_columns: int) -> dict[str, Tensor]:
    module = ByHand()
    strategy = squall.DownpourStrategy(num_columns=num_columns)
    trainer(strategy).fit(module, DataLoader(images(), batch_size=4))
    return whole(module)


def test_statistics_are_of_the_last_batch_though_steps_are_made_by_hand() -> None:
    alone = run(1, _by_hand, 1, lightning=True)[0]
    for seen in run(2, _by_hand, 2, lightning=True):
        check_equal(seen, alone)


# ------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("victim", [2, 3])
def test_a_killed_rank_ends_its_replica_and_not_the_run(job: Start, victim: int) -> None:
    started = job(4, f"main(num_columns=2, injector={lockstep(2, 3)}.fail_at({victim}, 2))").start()
    codes = started.wait()
    assert codes[victim] == -signal.SIGKILL
    assert codes[5 - victim] == 1, "the other rank of the replica leaves by itself"
    assert codes[:2] == [0, 0]
    check(started, [0, 1], num_live=1, num_lost=0, version=32)
    assert f"rank {5 - victim} leaves the run, and with it its replica, ranks 2 to 3." in started.output


def test_a_killed_rank_of_the_leaders_replica_is_the_leader_lost(job: Start) -> None:
    started = job(4, f"main(num_columns=2, injector={lockstep(2, 3)}.fail_at(1, 3))").start()
    codes = started.wait()
    assert codes == [1, -signal.SIGKILL, 1, 1]
    (path,) = started.folder.glob("rank0-lost-step=*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["global_step"] == int(path.stem.split("=")[1])
    assert checkpoint["state_dict"]["updates"].eq(checkpoint["global_step"]).all()
    assert checkpoint["state_dict"]["net.0.weight"].shape == (5, 4)
    assert started.output.count("All that it had learned is in") >= 1


def test_columns_that_are_told_to_end_do(job: Start) -> None:
    program = """
def hook(trainer, step):
    if trainer.global_rank == 0 and step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    started = job(4, program + "main(num_columns=2)").start()
    started.wait()  # which fails if they don't
    assert list(started.folder.glob("rank0-lost-step=*.ckpt"))


def test_a_stopped_rank_stops_its_replica_which_joins_again(job: Start) -> None:
    program = """
def hook(trainer, step):
    client, rank = trainer.strategy.client, trainer.global_rank
    if rank == 3:
        if step == 2 and client.generation == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if client.generation == 1:
            say("back")
    elif rank < 2 and step == 4:
        until("stopped")
        while client.call({"op": "report"})[0]["num_live"] > 1:
            time.sleep(0.01)
        say(f"given-up-{rank}")
    elif rank < 2 and step == 6:
        until("back")
"""
    events = "EventInjector().barrier_at([0, 1], 0).barrier_at([0, 1], 2)"
    started = job(4, f"{program}\nmain(num_columns=2, lease_timeout=3, injector={events})").start()
    poll(lambda: is_stopped(started.pids[3]), "rank 3 stopped")
    started.say("stopped")
    started.words("given-up-0")
    started.kill(3, signal.SIGCONT)
    assert started.wait() == [0, 0, 0, 0]
    result = check(started, [0, 1, 2, 3], num_live=2, num_joined=3, version=32)
    assert result["report"]["num_lost"] == 2, "the batch that it was in, and the one that it had in hand"
    assert started.result(2)["generation"] == started.result(3)["generation"] == 1


# ------------------------------------------------------------------ what can't be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_columns": 0}, "num_columns=0 must be a whole number, 1 or more"),
        ({"num_columns": "2"}, "num_columns='2' must be a whole number"),
        ({"num_columns": 2, "codec": "int8"}, "num_columns=2 with codec='int8'.* Set codec=\"fp32\", or num_columns=1"),
        ({"num_columns": 2, "schedule": [["lease", 0]]}, "num_columns=2 with a schedule.* Set schedule=None"),
    ],
)
def test_what_columns_cannot_do_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        squall.DownpourStrategy(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"devices": 3},
            r"num_columns=2 ranks make one replica, but devices=3. Set Trainer\(devices=...\) to a multiple",
        ),
        (
            {"devices": 2, "num_nodes": 2},
            r"num_columns=2: .* processes of one host, and num_nodes=2. Set num_columns=1",
        ),
    ],
)
def test_columns_that_make_no_replica_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(squall.DownpourStrategy(num_columns=2), **options)
