"""ColumnParallelStrategy: ranks, collectives, crossings, seeds and resuming."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import squall
from squall.models import AlexNet
from squall.placement import ColumnParameter, ColumnTensor, Speeds
from tests.ranks import RankError, run


class Net(LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Dropout2d(dropout), nn.Conv2d(5, 6, 3), nn.Flatten(),
            nn.Linear(96, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 4),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def _samples(num: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num, 3, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(4, (num,), generator=generator))


def _trainer(path: str, strategy: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, "precision": "64-true"}
    devices = strategy.num_columns if isinstance(strategy, squall.ColumnParallelStrategy) else 1
    defaults["devices"] = devices
    return Trainer(strategy=strategy, accelerator="cpu", default_root_dir=path, **quiet, **{**defaults, **options})


def _state(module: nn.Module) -> dict[str, Tensor]:
    assert not any(isinstance(value, ColumnTensor) for value in [*module.parameters(), *module.buffers()])
    return {key: value.clone() for key, value in module.state_dict().items()}


# ------------------------------------------------------------------ ranks and collectives


class Asking(Net):
    """Asks the strategy what its names promise, in the middle of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        assert isinstance(strategy, squall.ColumnParallelStrategy)
        rank = float(dist.get_rank())
        self.answers = {
            "rank": (self.global_rank, self.local_rank, dist.get_rank()),
            "place": (strategy.data_rank, strategy.column),
            "world_size": (strategy.world_size, self.trainer.world_size),
            "mean": strategy.reduce(torch.tensor(rank)).item(),
            "sum": strategy.reduce(torch.tensor(float(strategy.data_rank + 1)), reduce_op="sum").item(),
            "count": strategy.reduce(torch.tensor(3 + strategy.data_rank), reduce_op="sum").item(),
            "max": strategy.reduce(torch.tensor(rank), reduce_op="max").item(),
            "not a tensor": strategy.reduce(7),
            "all_gather": self.all_gather(torch.tensor([rank])).flatten().tolist(),
            "broadcast": strategy.broadcast({"from": self.global_rank}, src=1),
            "all": strategy.reduce_boolean_decision(self.global_rank < 3, all=True),
            "any": strategy.reduce_boolean_decision(self.global_rank == 3, all=False),
            "sampler": strategy.distributed_sampler_kwargs,
            "batch": batch[0].sum().item(),
        }
        strategy.barrier()
        return super().training_step(batch, batch_idx)


def _ask(path: str) -> dict[str, Any]:
    module = Asking()
    trainer = _trainer(path, squall.ColumnParallelStrategy(2), devices=4, limit_train_batches=1)
    trainer.fit(module, DataLoader(_samples(), batch_size=2))
    return module.answers


def test_ranks_and_collectives_mean_what_they_say(tmp_path: Path) -> None:
    answers = run(4, _ask, str(tmp_path), lightning=True)
    for rank, answer in enumerate(answers):
        assert answer["rank"] == (rank, rank, rank)
        assert answer["place"] == (rank // 2, rank % 2)
        assert answer["world_size"] == (4, 4)
        assert answer["mean"] == 1.5
        assert answer["sum"] == 3  # replicas 0 and 1 say 1 and 2; their columns say it twice
        assert answer["count"] == 7
        assert answer["max"] == 3
        assert answer["not a tensor"] == 7
        assert answer["all_gather"] == [0, 1, 2, 3]
        assert answer["broadcast"] == {"from": 1}
        assert answer["all"] is False
        assert answer["any"] is True
        assert answer["sampler"] == {"num_replicas": 2, "rank": rank // 2}
        assert answer["batch"] == answers[rank // 2 * 2]["batch"]
    assert answers[0]["batch"] != answers[2]["batch"]


# ------------------------------------------------------------------ AlexNet in two columns


class Krizhevsky(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = AlexNet(num_classes=1000, image_size=224, num_columns=2)

    def on_train_start(self) -> None:
        self.held = {name: parameter.data.as_subclass(Tensor).numel() for name, parameter in self._local()}

    def _local(self) -> list[tuple[str, Tensor]]:
        with torch._C.DisableTorchFunctionSubclass():
            return [(name, p.detach().as_subclass(Tensor)) for name, p in self.named_parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _train_alexnet(path: str) -> dict[str, Any]:
    module = Krizhevsky()
    data = TensorDataset(torch.randn(2, 3, 224, 224), torch.zeros(2, dtype=torch.long))
    strategy = squall.ColumnParallelStrategy(2)
    trainer = _trainer(path, strategy, precision="32-true", max_epochs=1, limit_train_batches=1)
    trainer.fit(module, DataLoader(data, batch_size=2))
    assert strategy.layout is not None
    return {
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "crossings": {c.name: c.floats_per_image_forward for c in strategy.crossings},
        "split": {layer.name for layer in strategy.layout if layer.split == "columns"},
        "held": module.held,
    }


def test_alexnet_in_two_columns_sends_what_the_paper_draws(tmp_path: Path) -> None:
    with torch.device("meta"):
        whole = {f"net.{name}": parameter.numel() for name, parameter in AlexNet(1000, 224, 2).named_parameters()}
    for answer in run(2, _train_alexnet, str(tmp_path), lightning=True):
        # Half of conv2's pooled maps, 128 x 13 x 13, then the halves that fc6, fc7 and fc8 read of the other column.
        assert answer["logged"]["crossings/forward_floats"] == 30_336 == 128 * 13 * 13 + 128 * 6 * 6 + 2048 + 2048
        assert sum(answer["crossings"].values()) == 30_336
        assert len(answer["split"]) == 7  # all but the last
        for name, held in answer["held"].items():
            split = name.rsplit(".", 1)[0] in answer["split"]
            assert held == whole[name] / (2 if split else 1), name


# ------------------------------------------------------------------ randomness


class Masks(Net):
    """Remembers its masks."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ones = torch.ones_like(self.net[3](self.net[0](batch[0])))
        assert isinstance(ones, ColumnTensor)
        split = F.dropout(ones, 0.5)
        with torch._C.DisableTorchFunctionSubclass():
            self.split = split.detach().as_subclass(Tensor).clone()
        self.whole = F.dropout(torch.ones(64), 0.5)
        self.drawn = torch.rand(3)
        return super().training_step(batch, batch_idx)


def _masks(path: str, seed: int | None) -> list[Tensor]:
    if seed is None:
        torch.seed()
    else:
        pl.seed_everything(seed, verbose=False)
    module = Masks()
    _trainer(path, squall.ColumnParallelStrategy(2)).fit(module, DataLoader(_samples(4), batch_size=4))
    return [module.split, module.whole, module.drawn, torch.cat([p.flatten() for p in module.state_dict().values()])]


@pytest.mark.parametrize("seed", [None, 3])
def test_masks_are_equal_where_replicated_and_differ_between_columns(tmp_path: Path, seed: int | None) -> None:
    (split, whole, drawn, weights), (other_split, *others) = run(2, _masks, str(tmp_path), seed, lightning=True)
    assert split.shape == other_split.shape
    assert not torch.equal(split, other_split)
    for value, other in zip((whole, drawn, weights), others, strict=True):
        assert torch.equal(value, other)


class Noisy(Dataset[Any]):
    """Samples that are made anew each time, as augmentation does it."""

    def __init__(self) -> None:
        self.samples = _samples(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        x, y = self.samples[index]
        return x + torch.rand(()) + random.random() + np.random.rand(), y


class Draws(Callback):
    """On rank 0 alone, as one does that logs some random images."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            torch.rand(3)
            np.random.rand(3)
            random.random()


def _dropped_out(path: str, batches: str, devices: int, callbacks: list[Callback]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    module = Net(dropout=0.5).double()
    strategy: Any = "auto" if devices == 1 else squall.ColumnParallelStrategy(2, batches=batches)  # type: ignore[arg-type]
    trainer = _trainer(path, strategy, devices=devices, callbacks=callbacks)
    trainer.fit(module, DataLoader(Noisy(), batch_size=2))
    return _state(module)


@pytest.mark.parametrize("callbacks", [[], [Draws()]], ids=["", "rank 0 draws"])
@pytest.mark.parametrize("batches", ["auto", "broadcast"])
def test_masks_are_those_of_one_device_whoever_draws_besides(
    batches: str, callbacks: list[Callback], tmp_path: Path
) -> None:
    (alone,) = run(1, _dropped_out, str(tmp_path), batches, 1, callbacks, lightning=True)
    for state in run(2, _dropped_out, str(tmp_path), batches, 2, callbacks, lightning=True):
        for key, value in alone.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


def test_seeds_reproduce(tmp_path: Path) -> None:
    first, again, other = (run(2, _masks, str(tmp_path), seed, lightning=True) for seed in (3, 3, 4))
    for value, repeated in zip(first[0], again[0], strict=True):
        assert torch.equal(value, repeated)
    assert not torch.equal(first[0][3], other[0][3])


# ------------------------------------------------------------------ resuming


def _run_part(path: str, num_columns: int, max_epochs: int, start: str | None, end: str | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module = Net().double()
    devices = max(num_columns, 1)
    trainer = _trainer(path, squall.ColumnParallelStrategy(num_columns), devices=devices, max_epochs=max_epochs)
    trainer.fit(module, DataLoader(_samples(), batch_size=4), ckpt_path=start, weights_only=False)
    if end is not None:
        trainer.save_checkpoint(end)
    return _state(module)


def test_resuming_on_1_2_and_4_columns_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    straight = run(1, _run_part, str(tmp_path), 1, 4, None, None, lightning=True)[0]
    paths = [str(tmp_path / f"{epochs}.ckpt") for epochs in range(5)]
    start = None
    for epochs, num_columns in ((1, 2), (2, 4), (3, 1), (4, 2)):
        end = paths[epochs]
        states = run(num_columns, _run_part, str(tmp_path), num_columns, epochs, start, end, lightning=True)
        start = end
    for state in states:
        for key, value in straight.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


def _resume_replicas(path: str, start: str) -> dict[str, Tensor]:
    module, data = Net().double(), _samples()
    trainer = _trainer(path, squall.ColumnParallelStrategy(2), devices=4, max_epochs=4)
    sampler = DistributedSampler(data, 2, int(os.environ["RANK"]) // 2, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=2, sampler=sampler), ckpt_path=start, weights_only=False)
    return _state(module)


def test_resuming_on_two_replicas_of_two_columns(tmp_path: Path) -> None:
    straight = run(1, _run_part, str(tmp_path), 1, 4, None, None, lightning=True)[0]
    start = str(tmp_path / "start.ckpt")
    run(2, _run_part, str(tmp_path), 2, 2, None, start, lightning=True)
    for state in run(4, _resume_replicas, str(tmp_path), start, lightning=True):
        for key, value in straight.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


def _whole_after(path: str) -> bool:
    module = Net().double()
    references = list(module.parameters())
    placed: list[bool] = []
    module.on_train_start = lambda: placed.append(  # type: ignore[method-assign]
        any(isinstance(p, ColumnParameter) for p in references)
    )
    trainer = _trainer(path, squall.ColumnParallelStrategy(2))
    trainer.fit(module, DataLoader(_samples(), batch_size=4))
    assert placed == [True]
    for parameter, reference in zip(module.parameters(), references, strict=True):
        assert parameter is reference
        assert type(parameter) is nn.Parameter
        assert parameter.shape == dict(Net().named_parameters())[_name(module, parameter)].shape
    optimizer = trainer.optimizers[0]
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    before = _state(module)
    module.training_step(next(iter(DataLoader(_samples(), batch_size=4, collate_fn=_double))), 0).backward()
    optimizer.step()
    return any(not torch.equal(value, before[key]) for key, value in _state(module).items())


def _double(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in rows]).double(), torch.stack([y for _, y in rows])


def _name(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, value in module.named_parameters() if value is parameter)


def test_the_module_and_its_optimizer_are_whole_after_fit(tmp_path: Path) -> None:
    assert run(2, _whole_after, str(tmp_path), lightning=True) == [True, True]


# ------------------------------------------------------------------ a layout that is measured


class Forward(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _fit_measured(
    path: str, layout: str, link: float, size: int = 8, num_replicas: int = 1
) -> tuple[dict[str, str], Any]:
    torch.manual_seed(1)
    module = Forward().double()
    if size:
        module.example_input_array = torch.zeros(1, 3, size, size, dtype=torch.float64)
    strategy = squall.ColumnParallelStrategy(2, layout=layout)
    with patch("squall._placed.measure_speeds", lambda *_: Speeds(1e11, 1e10, link, 0.0)):
        options = {"max_epochs": 2, "devices": 2 * num_replicas}
        _trainer(path, strategy, **options).fit(module, DataLoader(_samples(), batch_size=4))
    assert strategy.layout is not None
    return strategy.layout.to_dict(), _state(module)


def test_a_measured_layout_is_by_the_link_and_the_function_is_the_same(tmp_path: Path) -> None:
    expected = run(1, _run_part, str(tmp_path), 1, 2, None, None, lightning=True)[0]
    derived = run(2, _fit_measured, str(tmp_path), "auto", 1e10, lightning=True)[0][0]
    for link in (1e12, 1e4):
        (layout, state), (other, _) = run(2, _fit_measured, str(tmp_path), "measured", link, lightning=True)
        assert layout == other
        assert (layout == derived) == (link == 1e12), layout
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "message"), [(0, "set self.example_input_array"), (9, "that forward can take: ")])
def test_a_measured_layout_needs_to_know_a_step(tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(RankError, match=rf"{message}.* use layout='auto'"):
        run(2, _fit_measured, str(tmp_path), "measured", 1e10, size, lightning=True)


def _fit_measured_otherwise(path: str) -> dict[str, str]:
    """The second replica would have the slow link."""
    link = 1e12 if int(os.environ["RANK"]) < 2 else 1e4
    return _fit_measured(path, "measured", link, num_replicas=2)[0]


def test_replicas_have_one_layout(tmp_path: Path) -> None:
    first, *others = run(4, _fit_measured_otherwise, str(tmp_path), lightning=True)
    assert "columns" in first.values()
    assert all(other == first for other in others)
