"""Masks under Downpour: shards have live weights alone, and what is pushed and fetched is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import squall
from squall.sparsity import SET, DeepCompression, RigL, SparseMomentum, Static
from tests.ranks import run

from .test_sparse_placed import Masks, Net, loader

pytestmark = pytest.mark.asynchronous

DENSITY = 0.3


def _static() -> Static:
    return Static(density=DENSITY, seed=5)


def _fit(path: str, strategy: Any, optimizer: str = "momentum", **options: Any) -> dict[str, Any]:
    masks, module = Masks(), Net(optimizer)
    ckpt_path = options.pop("ckpt_path", None)
    options["callbacks"] = [masks, *options.get("callbacks", [])]
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), default_root_dir=path,
        precision="64-true", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": 3, "enable_checkpointing": len(options["callbacks"]) > 1, **options},
    )  # fmt: skip
    trainer.fit(module, loader(1), ckpt_path=ckpt_path, weights_only=False)
    assert all(torch.equal(masks.seen[0], mask) for mask in masks.seen)
    return {
        "masks": dict(trainer.strategy.masks),  # type: ignore[attr-defined]
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "state": trainer.optimizers[0].state_dict()["state"],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def _same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, mask in expected["masks"].items():
        assert torch.equal(actual["masks"][name], mask)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(actual["weights"][name], value, rtol=1e-10, atol=1e-12)
    for index, state in expected["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(actual["state"][index][name], value, rtol=1e-10, atol=1e-12)


def _one_and_alone(path: str, optimizer: str, num_shards: int, options: dict[str, Any]) -> None:
    alone = _fit(path, squall.SparseStrategy(_static()), optimizer, **options)
    strategy = squall.DownpourStrategy(num_shards=num_shards, sparsity=_static())
    _same(_fit(path, strategy, optimizer, **options), alone)


@pytest.mark.parametrize(
    ("optimizer", "num_shards", "options"),
    [("momentum", 1, {"gradient_clip_val": 0.1}), ("adamw", 3, {"accumulate_grad_batches": 2}), ("sgd", 2, {})],
)
def test_one_worker_trains_as_one_device_does(
    tmp_path: Path, optimizer: str, num_shards: int, options: dict[str, Any]
) -> None:
    run(1, _one_and_alone, str(tmp_path), optimizer, num_shards, options, lightning=True)


def _several(path: str, options: dict[str, Any], sparse: bool) -> dict[str, Any]:
    torch.manual_seed(100 + int(os.environ["RANK"]))  # masks are the leader's
    strategy = squall.DownpourStrategy(sparsity=Static(density=DENSITY) if sparse else None, **options)
    keep = ModelCheckpoint(dirpath=path, filename="last", save_on_train_epoch_end=True)
    seen = _fit_dense(path, strategy) if not sparse else _fit(path, strategy, callbacks=[keep])
    return seen | {"owed": strategy._own_state.get("owed")}


def _fit_dense(path: str, strategy: Any) -> dict[str, Any]:
    module = Net("momentum")
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), default_root_dir=path,
        precision="64-true", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader(1))
    return {"metrics": {name: float(value) for name, value in trainer.callback_metrics.items()}}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": True}, {"push_every": 2, "fetch_every": 3}, {"codec": "int8"}, {"codec": "1bit"}],
    ids=str,
)
def test_workers_have_one_mask_and_carry_what_lives(tmp_path: Path, num_ranks: int, options: dict[str, Any]) -> None:
    first, *others = run(num_ranks, _several, str(tmp_path), options, True, lightning=True)
    for other in others:
        for name, mask in first["masks"].items():
            assert torch.equal(other["masks"][name], mask)
        for name, value in first["weights"].items():
            assert torch.equal(other["weights"][name], value), name
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    for name, mask in first["masks"].items():
        assert torch.equal(saved["sparsity"]["masks"][name], mask)
        assert saved["state_dict"][name].shape == mask.shape
        assert not saved["state_dict"][name][~mask].any()
        assert saved["state_dict"][name][mask].all()
    if options:
        return
    dense, *_ = run(num_ranks, _several, str(tmp_path), options, False, lightning=True)
    num_live = sum(int(mask.sum()) for mask in first["masks"].values())
    num_biases = sum(value.numel() for name, value in first["weights"].items() if name not in first["masks"])
    num_all = sum(value.numel() for value in first["weights"].values())
    ratio = first["metrics"]["bytes/pushed"] / dense["metrics"]["bytes/pushed"]
    assert ratio == pytest.approx((num_live + num_biases) / num_all, abs=0.03)  # pieces begin at whole lines


def _from_moved_masks(path: str) -> dict[str, Any]:
    strategy = squall.DownpourStrategy(sparsity=Static(density=DENSITY), codec="1bit")
    return _fit(path, strategy, ckpt_path=f"{path}/moved.ckpt", max_epochs=3)


def _move_masks(path: str) -> dict[str, Any]:
    keep = ModelCheckpoint(dirpath=path, filename="moved")
    module, algorithm = Net("momentum"), SparseMomentum(density=DENSITY)
    trainer = Trainer(
        strategy=squall.SparseStrategy(algorithm), accelerator="cpu", devices=1, default_root_dir=path, logger=False,
        precision="64-true", max_epochs=2, callbacks=[keep], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(1))
    return dict(trainer.strategy.masks)  # type: ignore[attr-defined]


def test_a_training_that_moved_masks_goes_on_with_them(tmp_path: Path) -> None:
    (masks,) = run(1, _move_masks, str(tmp_path), lightning=True)
    for seen in run(2, _from_moved_masks, str(tmp_path), lightning=True):
        for name, mask in masks.items():
            assert torch.equal(seen["masks"][name], mask)
            assert not seen["weights"][name][~mask].any()


class Edits(Callback):
    """Doubles a bias's weight, and writes to all of a layer."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            with torch.no_grad():
                weight: Tensor = module.get_parameter("net.8.weight")
                weight.fill_(0.5)
                module.get_parameter("net.8.bias").mul_(2)


def _edited(path: str) -> None:
    expected = _fit_edited(path, squall.SparseStrategy(_static()))
    actual = _fit_edited(path, squall.DownpourStrategy(sparsity=_static()))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12)


def _fit_edited(path: str, strategy: Any) -> dict[str, Tensor]:
    module = Net("sgd")
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=1, default_root_dir=path, precision="64-true", max_epochs=1,
        callbacks=[Edits()], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader(1))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_edits_of_live_weights_count(tmp_path: Path) -> None:
    run(1, _edited, str(tmp_path), lightning=True)


@pytest.mark.parametrize("make", [SparseMomentum, RigL, SET, DeepCompression])
def test_masks_that_move_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"can't move masks so far\. Use squall\.sparsity\.Static"):
        squall.DownpourStrategy(sparsity=make())


class Whole(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


def test_an_optimizer_of_whole_layers_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        strategy=squall.DownpourStrategy(sparsity=_static()), accelerator="cpu", devices=1, max_epochs=1, logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="Adafactor doesn't treat every weight alone"):
        trainer.fit(Whole(""), loader(1))
