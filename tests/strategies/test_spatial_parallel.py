"""SpatialParallelStrategy: training, tiles and replicas, metrics, checkpoints, layouts, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import squall
from squall.models import LocallyConnectedAutoencoder
from squall.placement.tensor import SplitTensor, no_dispatch
from tests.ranks import run


class Net(LightningModule):
    """Batch normalisation, pooling and dropout over images of odd sizes."""

    def __init__(self, example: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Dropout(0.3), nn.Conv2d(6, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 4 * 3, 4),
        )  # fmt: skip
        if example:
            self.example_input_array = torch.zeros(1, 3, 13, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        output: Tensor = self(batch[0])
        return output

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def samples(num: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num, 3, 13, 11, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(4, (num,), generator=generator))


def trainer(path: str, strategy: Any = "auto", devices: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, "precision": "64-true"}
    return Trainer(
        strategy=strategy, devices=devices, accelerator="cpu", default_root_dir=path, **quiet, **{**defaults, **options}
    )


def fitted(path: str, strategy: Any, devices: int, ckpt_path: str | None = None, save: str = "") -> dict[str, Any]:
    torch.manual_seed(2)
    module = Net()
    fit = trainer(path, strategy, devices)
    loader = DataLoader(samples(), batch_size=4)
    fit.fit(module, loader, loader, ckpt_path=ckpt_path)
    if save:
        fit.save_checkpoint(save)
    metrics = {key: float(value) for key, value in fit.callback_metrics.items()}
    assert not any(isinstance(value, SplitTensor) for value in [*module.parameters(), *module.buffers()])
    return {"state": {key: value.clone() for key, value in module.state_dict().items()}, "metrics": metrics}


def in_tiles(path: str, num_tiles: Any, devices: int, **options: Any) -> dict[str, Any]:
    return fitted(path, squall.SpatialParallelStrategy(num_tiles), devices, **options)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("num_tiles", [2, 4, (2, 2), (1, 2)], ids=str)
def test_training_equals_one_device(num_tiles: Any, tmp_path: Path) -> None:
    alone = fitted(str(tmp_path), "auto", 1)
    num_ranks = num_tiles if isinstance(num_tiles, int) else num_tiles[0] * num_tiles[1]
    for result in run(num_ranks, in_tiles, str(tmp_path), num_tiles, num_ranks, lightning=True):
        assert_same(result["state"], alone["state"])
        for key in ("loss", "val_loss"):
            assert result["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-9)


class Recomputed(Net):
    """Checkpoints that end where some ranks wait for a fringe, and others have none, or no outputs at all."""

    def __init__(self) -> None:
        super().__init__(example=False)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1)),
                nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2)),
                nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d((2, 3))),
            ]
        )
        self.net = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        # What is cut but has no gradient is recomputed, too.
        x = checkpoint(self.stem, x, use_reentrant=False)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        output: Tensor = self.net(x.flatten(1))
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def recomputed(path: str, num_tiles: Any, devices: int) -> dict[str, Tensor]:
    module = Recomputed()
    strategy = "auto" if devices == 1 else squall.SpatialParallelStrategy(num_tiles)
    trainer(path, strategy, devices).fit(module, DataLoader(samples(8), batch_size=4))
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("num_tiles", [2, 3, (2, 2)], ids=str)
def test_checkpoints_of_activations_are_recomputed_alike(num_tiles: Any, tmp_path: Path) -> None:
    num_ranks = num_tiles if isinstance(num_tiles, int) else num_tiles[0] * num_tiles[1]
    alone = recomputed(str(tmp_path), 1, 1)
    for state in run(num_ranks, recomputed, str(tmp_path), num_tiles, num_ranks, lightning=True):
        assert_same(state, alone)


class Terminated(Net):
    """Rank 0 is told to end where the other one is about to wait for its rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 0 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def terminated(path: str) -> str:
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (of rank 1: its connection is closed)
        trainer(path, squall.SpatialParallelStrategy(2), 2).fit(Terminated(), DataLoader(samples(), batch_size=4))
    return type(caught.value).__name__


def test_sigterm_of_one_rank_ends_all(tmp_path: Path) -> None:
    assert run(2, terminated, str(tmp_path), lightning=True, timeout=60)[0] == "SIGTERMException"


class Looking(Net):
    """Draws in its forward pass, and looks at what it has drawn, so that it can't be run without values."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(4, dtype=x.dtype)
        output: Tensor = self.net(x) + (noise if noise.sum() > 0 else 0)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def looked(path: str, num_tiles: int) -> dict[str, Tensor]:
    module = Looking()
    strategy = "auto" if num_tiles == 1 else squall.SpatialParallelStrategy(num_tiles)
    torch.manual_seed(4)
    trainer(path, strategy, num_tiles, max_epochs=1).fit(module, DataLoader(samples(4), batch_size=4))
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_a_derived_layout_leaves_random_numbers_as_they_are(tmp_path: Path) -> None:
    alone = looked(str(tmp_path), 1)
    for state in run(2, looked, str(tmp_path), 2, lightning=True):
        assert_same(state, alone)


def laid_out(path: str) -> int | None:
    tiled = trainer(path, squall.SpatialParallelStrategy(2), 2, max_epochs=1)
    tiled.fit(Net(), DataLoader(samples(4), batch_size=4))
    floats: int | None = tiled.strategy.layout["net.0"].floats_per_image
    return floats


def test_an_example_of_another_precision_lays_out_as_well(tmp_path: Path) -> None:
    assert run(2, laid_out, str(tmp_path), lightning=True) == [33, 33]


class Replicated(Net):
    """Without what makes replicas differ from one device: statistics of a replica, and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[4] = nn.GroupNorm(2, 6), nn.Identity()


def replicated(path: str, strategy: Any, devices: int) -> dict[str, Tensor]:
    module = Replicated()
    strategy = squall.SpatialParallelStrategy(2) if strategy == "tiles" else strategy
    fit = trainer(path, strategy, devices, use_distributed_sampler=False)
    data = samples()
    batches = [data[index : index + 4] for index in range(0, 16, 4)]
    part = slice(None)
    if devices > 1:
        assert fit.strategy.data_parallel_size == 2
        replica = int(os.environ["RANK"]) // 2
        part = slice(2 * replica, 2 * replica + 2)
    own = [(x[part], y[part]) for x, y in batches]
    fit.fit(module, DataLoader(own, batch_size=None))
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_tiles_within_replicas(tmp_path: Path) -> None:
    alone = replicated(str(tmp_path), "auto", 1)
    for state in run(4, replicated, str(tmp_path), "tiles", 4, lightning=True):
        assert_same(state, alone)


def test_what_crosses_is_logged(tmp_path: Path) -> None:
    metrics = run(2, in_tiles, str(tmp_path), 2, 2, lightning=True)[0]["metrics"]
    # One row of 11 places and 3 channels each way; the pooling's last window reads one row more than rank 0 holds.
    assert metrics["crossings/net.0"] == 33
    assert metrics["crossings/forward_floats"] > 33
    assert metrics["crossings/bytes"] > 8 * metrics["crossings/forward_floats"]


def test_checkpoints_are_plain_and_resume_elsewhere(tmp_path: Path) -> None:
    path = str(tmp_path / "tiles.ckpt")
    run(2, in_tiles, str(tmp_path), 2, 2, save=path, lightning=True)
    fitted(str(tmp_path), "auto", 1, save=str(tmp_path / "alone.ckpt"))
    tiled, alone = (torch.load(tmp_path / name, weights_only=False) for name in ("tiles.ckpt", "alone.ckpt"))
    assert_same(tiled["state_dict"], alone["state_dict"])
    momenta = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (tiled, alone)]
    assert_same(*[{key: value["momentum_buffer"] for key, value in state.items()} for state in momenta])
    assert {type(value) for value in tiled["state_dict"].values()} == {Tensor}


def evaluated(path: str, strategy: Any, devices: int) -> dict[str, Any]:
    module = Net()
    run_ = trainer(path, squall.SpatialParallelStrategy(2) if strategy == "tiles" else strategy, devices)
    loader = DataLoader(samples(6), batch_size=4)
    validated, tested = run_.validate(module, loader, verbose=False), run_.test(module, loader, verbose=False)
    predicted = run_.predict(module, loader)
    return {"validated": validated, "tested": tested, "predicted": torch.cat(predicted)}


def test_validate_test_and_predict(tmp_path: Path) -> None:
    alone = evaluated(str(tmp_path), "auto", 1)
    for result in run(2, evaluated, str(tmp_path), "tiles", 2, lightning=True):
        torch.testing.assert_close(result["predicted"], alone["predicted"], rtol=1e-10, atol=1e-12)
        assert result["tested"][0]["val_loss"] == pytest.approx(alone["tested"][0]["val_loss"], rel=1e-10)
        assert result["validated"][0]["val_loss"] == pytest.approx(alone["validated"][0]["val_loss"], rel=1e-10)


class Untied(LocallyConnectedAutoencoder):
    """Looks at what of its weights this rank holds."""

    held = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with no_dispatch():
            self.held = self.filters.weight.numel()


def autoencoded(path: str, num_tiles: int, save: str = "") -> dict[str, Any]:
    torch.manual_seed(3)
    module = Untied(num_filters=3).double()
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(12, 1, 16, 16, generator=generator, dtype=torch.float64)
    strategy = squall.SpatialParallelStrategy(num_tiles) if num_tiles > 1 else "auto"
    fit = trainer(path, strategy, num_tiles, gradient_clip_val=0.01)
    fit.fit(module, DataLoader(images, batch_size=4))
    if save:
        fit.save_checkpoint(save)
    return {"state": dict(module.state_dict()), "held": module.held}


def test_untied_weights_live_only_on_their_tile(tmp_path: Path) -> None:
    alone = autoencoded(str(tmp_path), 1)
    whole = alone["state"]["filters.weight"].numel()
    path = str(tmp_path / "tiles.ckpt")
    results = run(2, autoencoded, str(tmp_path), 2, path, lightning=True)
    assert [result["held"] for result in results] == [whole * 3 // 5, whole * 2 // 5]
    for result in results:
        assert_same(result["state"], alone["state"])
    saved = torch.load(path, weights_only=False)
    assert_same(saved["state_dict"], alone["state"])
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].shape == alone["state"]["filters.weight"].shape


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("num_tiles", [0, -1, (2,), (2, 0), (1, 2, 3), 2.0, "2", True], ids=str)
def test_tiles_that_are_none(num_tiles: Any) -> None:
    with pytest.raises(MisconfigurationException, match="num_tiles="):
        squall.SpatialParallelStrategy(num_tiles)


def test_tiles_that_are_not_the_ranks() -> None:
    with pytest.raises(MisconfigurationException, match=r"num_tiles=\(2, 2\) x data_parallel_size=1 needs 4 processes"):
        Trainer(strategy=squall.SpatialParallelStrategy((2, 2)), devices=2, accelerator="cpu")


def test_a_layout_that_is_none() -> None:
    with pytest.raises(MisconfigurationException, match="'tiles' or kept 'whole'"):
        squall.SpatialParallelStrategy(layout={"net.0": "columns"})


def refused(path: str, layout: dict[str, str], example: bool, size: int) -> str:
    module = Net(example)
    images = TensorDataset(torch.zeros(4, 3, size, 11, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    if example:
        module.example_input_array = torch.zeros(1, 3, size, 11)
    with pytest.raises(MisconfigurationException) as caught:
        trainer(path, squall.SpatialParallelStrategy(2, layout=layout), 2).fit(module, DataLoader(images, batch_size=2))
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "example", "size", "message"),
    [
        ({"nets.0": "tiles"}, True, 13, "names 'nets.0', which is no layer"),
        ({"net.8": "tiles"}, True, 13, "net.8.*is not possible for Linear"),
        ({}, True, 1, "num_tiles=2 is more than an image of 1 at layer 'net.0' has places for"),
        ({}, False, 1, "num_tiles=2 is more than an image of 1 at layer 'net.0' has places for"),
    ],
)
def test_what_is_refused_before_the_first_batch(
    layout: dict[str, str], example: bool, size: int, message: str, tmp_path: Path
) -> None:
    for said in run(2, refused, str(tmp_path), layout, example, size, lightning=True):
        assert re.search(message, said), said
