"""Training with sparse passes: the same as with dense ones, but for rounding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import squall
from squall.kernels import native
from squall.sparsity import SET, DeepCompression, RigL, SparseMomentum, Static

pytestmark = pytest.mark.skipif(native.isa() == "torch", reason="needs the compiled kernels")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 9, 40), nn.ReLU(), nn.Linear(40, 5),
        )  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class Dense(Callback):
    """In which steps a dense gradient was computed."""

    def __init__(self) -> None:
        self.steps: list[bool] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.steps.append(bool(pl_module.net[5].weight.grad[~strategy.masks["net.5.weight"]].any()))


def fit(sparsity: Any, compute: str, **options: Any) -> tuple[Module, dict[str, Tensor], Dense]:
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(48, 3, 8, 8, generator=generator), torch.arange(48) % 5)
    module, dense = Module(), Dense()
    strategy = squall.SparseStrategy(sparsity, compute=compute)
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[dense], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module, strategy.masks, dense


@pytest.mark.parametrize(
    "make",
    [
        lambda: Static(0.1, seed=0), lambda: SET(0.1, seed=0), lambda: RigL(0.1, update_every=5, seed=0),
        lambda: SparseMomentum(0.1, seed=0), lambda: SparseMomentum(0.1, seed=0, dense_every=3),
        lambda: DeepCompression(density=0.15, bits={"*": 3}, retrain=1, share=1, num_rounds=1, dirpath=None),
    ],
)  # fmt: skip
def test_equals_dense_computation(make: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (dense, masks, _), (sparse, same, _) = fit(make(), "dense"), fit(make(), "sparse")
    for name, mask in masks.items():
        assert torch.equal(mask, same[name])
    torch.testing.assert_close(torch.tensor(sparse.losses), torch.tensor(dense.losses), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all("forward" not in vars(layer) for layer in sparse.modules())


@pytest.mark.parametrize(
    ("make", "every"),
    [(lambda: RigL(0.1, update_every=6, stop=1.0, seed=0), 6), (lambda: SparseMomentum(0.1, seed=0, dense_every=4), 4)],
)
def test_dense_gradients_are_computed_where_they_are_read(make: Any, every: int) -> None:
    _, _, dense = fit(make(), "sparse")
    assert dense.steps == [(step + 1) % every == 0 for step in range(18)]


def test_copies_of_the_module_are_dense() -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            x = torch.ones(2, 3, 8, 8)
            copied = copy.deepcopy(pl_module.net)
            file = io.BytesIO()
            torch.save(pl_module.net, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
            before = pl_module.net(x)
            for other in (copied, loaded):
                torch.testing.assert_close(other(x), before, rtol=1e-4, atol=1e-5)
                assert not any("_Forward" in type(vars(layer).get("forward")).__name__ for layer in other.modules())
            copied[0].weight.data.add_(1)
            assert not torch.allclose(copied(x), before)
            assert torch.equal(pl_module.net(x), before)

    module = Module()
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)), batch_size=8)
    strategy = squall.SparseStrategy(Static(0.1), compute="sparse")
    Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Copies()],
    ).fit(module, data)  # fmt: skip


def test_bad_arguments() -> None:
    with pytest.raises(MisconfigurationException, match="compute='fast' must be 'dense' or 'sparse'"):
        squall.SparseStrategy(compute="fast")
    with pytest.raises(ValueError, match="dense_every=0 must be a number of steps"):
        SparseMomentum(dense_every=0)
