"""Masks over layers of which ranks hold parts: decided on, trained and saved as SparseStrategy does on one device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import squall
from squall.placement import ColumnParameter
from squall.sparsity import SET, DeepCompression, RigL, SparseAlgorithm, SparseMomentum, Static
from tests.ranks import run

BATCH = 8
MAKERS: dict[str, Callable[[], SparseAlgorithm]] = {
    "momentum": lambda: SparseMomentum(density=0.3, seed=5),
    "momentum, each 2 steps": lambda: SparseMomentum(density=0.3, seed=5, update_every=2, dense_every=2),
    "rigl": lambda: RigL(density=0.3, update_every=3, stop=1.0, seed=5),
    "set": lambda: SET(density=0.3, seed=5),
    "static": lambda: Static(density=0.3, seed=5),
}
STRATEGIES: dict[str, Callable[[SparseAlgorithm], Any]] = {
    "whole": lambda algorithm: squall.SparseStrategy(algorithm),
    "columns": lambda algorithm: squall.ColumnParallelStrategy(num_columns=2, sparsity=algorithm),
    "4 columns": lambda algorithm: squall.ColumnParallelStrategy(num_columns=4, sparsity=algorithm),
    "tiles": lambda algorithm: squall.SpatialParallelStrategy(num_tiles=2, sparsity=algorithm),
    "hybrid": lambda algorithm: squall.HybridParallelStrategy(zero_stage=None, sparsity=algorithm),
}


class Net(LightningModule):
    """Uneven layers, one with groups."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2),
            nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 3),
        )  # fmt: skip
        self.double()
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters())
        momentum = 0.9 if self.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Masks(Callback):
    """Notes the masks after every batch, and that weights are dead where they say."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        strategy: Any = trainer.strategy
        self.seen.append(torch.cat([mask.flatten() for mask in strategy.masks.values()]))
        for name, mask in strategy.masks.items():
            weight = module.get_parameter(name)
            assert weight.shape == mask.shape
            assert not (weight.detach() * ~mask).any(), f"{name} has weights where none lives"


def loader(num_replicas: int) -> DataLoader[Any]:
    """Four batches an epoch, each dealt out to the replicas."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * BATCH, 2, 8, 8, generator=generator, dtype=torch.float64)
    samples = TensorDataset(x[:, :, :8, :8], torch.randint(3, (4 * BATCH,), generator=generator))
    if num_replicas == 1:
        return DataLoader(samples, BATCH)
    sampler = DistributedSampler(samples, num_replicas, int(os.environ["RANK"]), shuffle=False)
    return DataLoader(samples, BATCH // num_replicas, sampler=sampler)


def _fit(
    path: str,
    where: str,
    num_ranks: int,
    kind: str,
    optimizer: str = "momentum",
    ckpt_path: str | None = None,
    module: LightningModule | None = None,
    **options: Any,
) -> dict[str, Any]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    masks, module = Masks(), Net(optimizer) if module is None else module
    options["callbacks"] = [masks, *options.get("callbacks", [])]
    trainer = Trainer(
        strategy=STRATEGIES[where](MAKERS[kind]()), accelerator="cpu", devices=num_ranks, default_root_dir=path,
        precision="64-true", use_distributed_sampler=False,
        **quiet, **{"enable_checkpointing": len(options["callbacks"]) > 1, "max_epochs": 3, **options},
    )  # fmt: skip
    trainer.fit(module, loader(num_ranks if where == "hybrid" else 1), ckpt_path=ckpt_path, weights_only=False)
    assert not any(isinstance(parameter, ColumnParameter) for parameter in module.parameters())
    return {
        "masks": torch.stack(masks.seen),
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "state": trainer.optimizers[0].state_dict()["state"],
        "metrics": {name: float(v) for name, v in trainer.callback_metrics.items() if "crossings" not in name},
    }


def _same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(actual["masks"], expected["masks"][-len(actual["masks"]) :])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(
            actual["weights"][name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    for index, state in expected["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(actual["state"][index][name], value, rtol=1e-9, atol=1e-12)
    if len(actual["masks"]) == len(expected["masks"]):  # or it knows nothing of what was logged before
        assert actual["metrics"] == pytest.approx(expected["metrics"])


@pytest.mark.parametrize(
    ("where", "num_ranks", "kind", "optimizer", "options"),
    [
        ("columns", 2, "momentum", "momentum", {"gradient_clip_val": 0.1}),
        ("columns", 2, "momentum", "sgd", {"gradient_clip_val": 0.1}),
        ("columns", 2, "momentum", "adamw", {"accumulate_grad_batches": 2}),
        ("columns", 2, "momentum, each 2 steps", "momentum", {}),
        ("columns", 2, "rigl", "momentum", {}),
        ("columns", 2, "set", "adamw", {}),
        ("columns", 2, "static", "momentum", {}),
        ("4 columns", 4, "momentum", "momentum", {}),
        ("4 columns", 4, "rigl", "adamw", {}),
        ("tiles", 2, "momentum", "momentum", {"gradient_clip_val": 0.1}),
        ("tiles", 2, "rigl", "adamw", {}),
        ("hybrid", 2, "momentum", "momentum", {}),
        ("hybrid", 2, "momentum, each 2 steps", "adamw", {}),
        ("hybrid", 2, "rigl", "momentum", {}),
        ("hybrid", 2, "set", "sgd", {}),
    ],
)
def test_trains_as_on_one_device(
    tmp_path: Path, where: str, num_ranks: int, kind: str, optimizer: str, options: dict[str, Any]
) -> None:
    (alone,) = run(1, _fit, str(tmp_path), "whole", 1, kind, optimizer, lightning=True, **options)
    moved = [not torch.equal(before, after) for before, after in zip(alone["masks"], alone["masks"][1:], strict=False)]
    assert sum(moved) >= (0 if kind == "static" else 2)
    for together in run(num_ranks, _fit, str(tmp_path), where, num_ranks, kind, optimizer, lightning=True, **options):
        _same(together, alone)


def test_replicas_of_columns_have_the_first_one_s_masks(tmp_path: Path) -> None:
    """Two replicas of two columns, which see the same batches here, are one device."""
    (alone,) = run(1, _fit, str(tmp_path), "whole", 1, "momentum", lightning=True)
    for together in run(4, _fit, str(tmp_path), "columns", 4, "momentum", lightning=True):
        _same(together, alone)


def _save(path: str, where: str, num_ranks: int, kind: str, at: int) -> dict[str, Any]:
    keep = ModelCheckpoint(dirpath=path, filename=f"{where}-{{step}}", every_n_train_steps=at, save_top_k=-1)
    return _fit(path, where, num_ranks, kind, callbacks=[keep])


@pytest.mark.parametrize("kind", ["momentum", "rigl"])
def test_a_checkpoint_goes_on_under_any_other_placement(tmp_path: Path, kind: str) -> None:
    (alone,) = run(1, _save, str(tmp_path), "whole", 1, kind, 4, lightning=True)
    run(2, _save, str(tmp_path), "columns", 2, kind, 4, lightning=True)
    run(2, _save, str(tmp_path), "hybrid", 2, kind, 4, lightning=True)
    saved = {w: torch.load(tmp_path / f"{w}-step=8.ckpt", weights_only=False) for w in ("whole", "columns", "hybrid")}
    for where in ("columns", "hybrid"):
        assert saved[where].keys() == saved["whole"].keys()
        for name, mask in saved["whole"]["sparsity"]["masks"].items():
            assert torch.equal(saved[where]["sparsity"]["masks"][name], mask)
    for before, where, num_ranks in (
        ("columns", "whole", 1), ("columns", "4 columns", 4), ("columns", "hybrid", 2), ("hybrid", "columns", 2),
        ("whole", "columns", 2),
    ):  # fmt: skip
        ckpt_path = str(tmp_path / f"{before}-step=8.ckpt")
        for resumed in run(
            num_ranks, _fit, str(tmp_path), where, num_ranks, kind, "momentum", ckpt_path, lightning=True
        ):
            assert len(resumed["masks"]) == 4
            _same(resumed, alone)


def test_momentum_beside_an_optimizer_without_any_is_saved_whole(tmp_path: Path) -> None:
    def save(where: str, num_ranks: int) -> dict[str, Tensor]:
        run(num_ranks, _save_sgd, str(tmp_path), where, num_ranks, lightning=True)
        saved = torch.load(tmp_path / f"{where}.ckpt", weights_only=False)["sparsity"]["momentum"]
        return dict(saved)

    alone, columns = save("whole", 1), save("columns", 2)
    assert len(alone) == 5
    for name, value in alone.items():
        torch.testing.assert_close(columns[name], value, rtol=1e-10, atol=1e-12)


def _save_sgd(path: str, where: str, num_ranks: int) -> None:
    keep = ModelCheckpoint(dirpath=path, filename=where)
    _fit(path, where, num_ranks, "momentum", "sgd", callbacks=[keep], max_epochs=1)


def _fit_twice(path: str, where: str, num_ranks: int) -> dict[str, Tensor]:
    trainer = Trainer(
        strategy=STRATEGIES[where](MAKERS["momentum"]()), accelerator="cpu", devices=num_ranks, max_epochs=1,
        default_root_dir=path, precision="64-true", use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = Net("sgd")
    trainer.fit(module, loader(1))
    trainer.save_checkpoint(f"{path}/{where}.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(1))
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_what_is_saved_after_fit_is_whole_and_another_fit_goes_on(tmp_path: Path) -> None:
    expected = run(1, _fit_twice, str(tmp_path), "whole", 1, lightning=True)[0]
    alone = torch.load(tmp_path / "whole.ckpt", weights_only=False)["sparsity"]["momentum"]
    for weights in run(2, _fit_twice, str(tmp_path), "columns", 2, lightning=True):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)
    columns = torch.load(tmp_path / "columns.ckpt", weights_only=False)["sparsity"]["momentum"]
    for name, value in alone.items():
        torch.testing.assert_close(columns[name], value, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ what can't be


def _refused(path: str, make: str, optimizer: str) -> str:
    strategies: dict[str, Callable[[], Any]] = {
        "columns": lambda: squall.ColumnParallelStrategy(sparsity=Static(density=0.3)),
        "compressed columns": lambda: squall.ColumnParallelStrategy(sparsity=DeepCompression()),
        "compressed hybrid": lambda: squall.HybridParallelStrategy(zero_stage=None, sparsity=DeepCompression()),
        "partitioned hybrid": lambda: squall.HybridParallelStrategy(zero_stage=2, sparsity=Static(density=0.3)),
    }
    trainer = Trainer(
        strategy=strategies[make](), accelerator="cpu", devices=2, max_epochs=8, default_root_dir=path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, precision="64-true",
        use_distributed_sampler=False,
    )  # fmt: skip
    try:
        trainer.fit(Net(optimizer), loader(1))
    except (ValueError, MisconfigurationException) as error:
        assert trainer.global_step == 0
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("make", "optimizer", "words"),
    [
        ("columns", "lbfgs", "LBFGS doesn't treat every weight alone"),
        ("compressed columns", "momentum", "Train with squall.SparseStrategy(DeepCompression(...), inner='ddp')"),
        ("compressed hybrid", "momentum", "Train with squall.SparseStrategy(DeepCompression(...), inner='ddp')"),
        ("partitioned hybrid", "momentum", "zero_stage=2 is not possible: sparsity has masks"),
    ],
)
def test_what_can_t_be_is_refused_before_the_first_batch(tmp_path: Path, make: str, optimizer: str, words: str) -> None:
    for message in run(2, _refused, str(tmp_path), make, optimizer, lightning=True):
        assert words in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: squall.ColumnParallelStrategy(sparsity=0.3), "sparsity=0.3 must be an algorithm"),  # type: ignore[arg-type]
        (lambda: squall.SpatialParallelStrategy(sparsity=0.3), "sparsity=0.3 must be an algorithm"),  # type: ignore[arg-type]
        (lambda: squall.HybridParallelStrategy(sparsity=0.3), "sparsity=0.3 must be an algorithm"),  # type: ignore[arg-type]
        (
            lambda: squall.ColumnParallelStrategy(sparsity=Static(), save_distributed_checkpoint=True),
            "has no place for masks",
        ),
        (lambda: squall.HybridParallelStrategy(sparsity=Static(), fc_update="pass"), "fc_update='pass' with sparsity"),
    ],
)
def test_arguments(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        make()
