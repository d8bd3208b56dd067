"""SparseStrategy: ranks with equal masks, runs that go on as if they had not been interrupted, metrics and errors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import squall
from squall.sparsity import (
    SET,
    CompressedCheckpointIO,
    RigL,
    SparseAlgorithm,
    SparseMomentum,
    Static,
    load_compressed,
    save_compressed,
)
from tests.ranks import run

MAKERS: dict[str, Callable[[], SparseAlgorithm]] = {
    "sparse_momentum": lambda: SparseMomentum(density=0.3),
    "rigl": lambda: RigL(density=0.3, update_every=3, stop=1.0),
    "set": lambda: SET(density=0.3),
    "static": lambda: Static(density=0.3),
}


class Net(LightningModule):
    """A small network whose optimizer is named."""

    def __init__(self, optimizer: str = "momentum") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
        )  # fmt: skip
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        momentum = 0.9 if self.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Batches:
    """Four batches an epoch, each rank's own, which can be resumed in mid-epoch."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.position, self.start = rank, 0, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for self.position in range(start + 1, 5):
            generator = torch.Generator().manual_seed(10 * self.position + self.rank)
            yield torch.randn(6, 2, 6, 6, generator=generator), torch.randint(3, (6,), generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % 4


class Watch(Callback):
    """Notes the masks after every batch, and that what is dead is 0 in every forward pass."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.handle = pl_module.net.register_forward_pre_hook(lambda *args: self.check(trainer, pl_module))

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, mask in trainer.strategy.masks.items():  # type: ignore[attr-defined]
            assert not pl_module.get_parameter(name)[~mask].any()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.handle.remove()
        self.check(trainer, pl_module)
        self.masks.append(flat(trainer))


def flat(trainer: Trainer) -> Tensor:
    return torch.cat([mask.flatten() for mask in trainer.strategy.masks.values()]).clone()  # type: ignore[attr-defined]


def trainer_of(path: Path | str, algorithm: SparseAlgorithm | None, inner: Any = "single", **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 3, "devices": 1, "use_distributed_sampler": False}
    strategy = squall.SparseStrategy(algorithm, inner=inner)
    return Trainer(strategy=strategy, accelerator="cpu", default_root_dir=path, **{**quiet, **options})


# ------------------------------------------------------------------ several ranks


def _train_apart(path: str, kind: str, optimizer: str, num_ranks: int) -> dict[str, Any]:
    """Every rank has its own generators and its own data."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(100 + rank)
    watch, module = Watch(), Net(optimizer)
    torch.manual_seed(100 + rank)
    with redirect_stdout(io.StringIO()) as written:
        trainer = trainer_of(path, MAKERS[kind](), "ddp", devices=num_ranks, callbacks=[watch])
        trainer.fit(module, Batches(rank))
    return {
        "masks": torch.stack(watch.masks),
        "weights": {key: value.detach().clone() for key, value in module.named_parameters()},
        "printed": written.getvalue(),
        "generator": trainer.strategy._training.state_dict()["generator"],  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize(("kind", "optimizer"), [*((kind, "momentum") for kind in MAKERS), ("sparse_momentum", "sgd")])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_masks_are_equal_on_all_ranks_with_different_data(
    tmp_path: Path, num_ranks: int, kind: str, optimizer: str
) -> None:
    first, *others = run(num_ranks, _train_apart, str(tmp_path), kind, optimizer, num_ranks, lightning=True)
    assert first["masks"].shape[0] == 12
    assert len(set(first["masks"].sum(1).tolist())) == 1, "weights came or went"
    moved = not torch.equal(first["masks"][0], first["masks"][-1])
    assert moved == (kind != "static")
    assert "net.4" in first["printed"]
    for other in others:
        assert torch.equal(other["masks"], first["masks"])
        assert torch.equal(other["generator"], first["generator"])
        for name, value in first["weights"].items():
            assert torch.equal(value, other["weights"][name]), name
        assert "net.4" not in other["printed"], "the table is the first rank's to print"


class Parting(Net):
    """Ranks whose gradients differ, as those of an own communication hook might."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1 + self.global_rank * torch.rand_like(parameter)


def _train_parting(path: str) -> tuple[Tensor, Tensor]:
    watch, module = Watch(), Parting()
    trainer_of(path, SparseMomentum(density=0.3), "ddp", devices=2, callbacks=[watch]).fit(module, Batches())
    return torch.stack(watch.masks), module.net[4].weight.detach().clone()


def test_ranks_that_part_keep_the_first_one_s_masks(tmp_path: Path) -> None:
    first, second = run(2, _train_parting, str(tmp_path), lightning=True)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[0][0], first[0][-1])
    assert torch.equal(first[0], second[0])


def _equal_batches(path: str, kind: str, num_ranks: int) -> Tensor:
    torch.manual_seed(7)
    trainer = trainer_of(path, MAKERS[kind](), "ddp", devices=num_ranks, precision="64-true")
    trainer.fit(Net(), Batches())
    return flat(trainer)


def test_two_ranks_with_equal_data_choose_what_one_does(tmp_path: Path) -> None:
    (one,) = run(1, _equal_batches, str(tmp_path), "sparse_momentum", 1, lightning=True)
    for mask in run(2, _equal_batches, str(tmp_path), "sparse_momentum", 2, lightning=True):
        assert torch.equal(mask, one)


class Asking(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        rank = float(dist.get_rank())
        strategy.barrier()
        self.answers = {
            "rank": (self.global_rank, strategy.local_rank, strategy.is_global_zero),
            "world_size": strategy.world_size,
            "mean": strategy.reduce(torch.tensor(rank)).item(),
            "sum": strategy.reduce(torch.tensor(rank), reduce_op="sum").item(),
            "broadcast": strategy.broadcast(rank, src=1),
            "all_gather": self.all_gather(torch.tensor(rank)).tolist(),
            "launcher": type(strategy.launcher).__name__,
        }
        return super().training_step(batch, batch_idx)


def _ask(path: str) -> dict[str, Any]:
    module = Asking()
    trainer_of(path, None, "ddp", devices=2, max_epochs=1).fit(module, Batches())
    return module.answers


def test_ranks_and_collectives_are_those_of_ddp(tmp_path: Path) -> None:
    for rank, answer in enumerate(run(2, _ask, str(tmp_path), lightning=True)):
        assert answer == {
            "rank": (rank, rank, rank == 0), "world_size": 2, "mean": 0.5, "sum": 1.0, "broadcast": 1.0,
            "all_gather": [0.0, 1.0], "launcher": "HydraAwareLauncher",
        }  # fmt: skip


def test_the_kinds_are_lightning_s_own() -> None:
    assert isinstance(squall.SparseStrategy(inner="single"), SingleDeviceStrategy | squall.SparseStrategy)
    single, ddp = squall.SparseStrategy(), squall.SparseStrategy(inner="ddp")
    assert isinstance(single, SingleDeviceStrategy)
    assert isinstance(ddp, DDPStrategy)
    assert isinstance(single, squall.SparseStrategy)
    assert isinstance(ddp, squall.SparseStrategy)
    for name, inner in (("sparse", "single"), ("sparse_ddp", "ddp")):
        strategy = Trainer(strategy=name, accelerator="cpu", devices=1, logger=False).strategy
        assert isinstance(strategy, squall.SparseStrategy)
        assert strategy.inner == inner


# ------------------------------------------------------------------ going on


def _interrupted(path: str, kind: str, inner: str, optimizer: str, at: int, num_ranks: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    options: dict[str, Any] = {"devices": num_ranks}

    def fit(ckpt_path: str | None, **more: Any) -> tuple[dict[str, Any], Tensor, Any]:
        torch.manual_seed(3)
        module = Net(optimizer)
        torch.manual_seed(3)
        trainer = trainer_of(path, MAKERS[kind](), inner, **options, **more)
        trainer.fit(module, Batches(rank), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return dict(module.state_dict()), flat(trainer), trainer.optimizers[0].state_dict()["state"]

    keep = ModelCheckpoint(dirpath=path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    straight = fit(None, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(f"{path}/step={at}.ckpt")
    assert torch.equal(straight[1], resumed[1])
    for key, value in straight[0].items():
        assert torch.equal(value, resumed[0][key]), key
    for index, state in straight[2].items():
        for key, value in state.items():
            assert torch.equal(value, resumed[2][index][key]) if isinstance(value, Tensor) else True, key


@pytest.mark.parametrize(("kind", "optimizer"), [
    ("sparse_momentum", "momentum"), ("sparse_momentum", "sgd"), ("sparse_momentum", "adamw"), ("rigl", "momentum"),
    ("set", "sgd"), ("static", "momentum"),
])  # fmt: skip
@pytest.mark.parametrize("at", [2, 4, 7])  # before any update; at the end of an epoch; in mid-epoch after one
def test_an_interrupted_run_is_an_uninterrupted_one(tmp_path: Path, at: int, kind: str, optimizer: str) -> None:
    _interrupted(str(tmp_path), kind, "single", optimizer, at, 1)


@pytest.mark.parametrize("kind", ["sparse_momentum", "rigl"])
@pytest.mark.parametrize("at", [4, 7])
def test_an_interrupted_run_of_two_ranks_is_an_uninterrupted_one(tmp_path: Path, at: int, kind: str) -> None:
    run(2, _interrupted, str(tmp_path), kind, "ddp", "momentum", at, 2, lightning=True)


def test_a_second_fit_goes_on_with_the_masks(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, SparseMomentum(density=0.3), max_epochs=1), Net()
    trainer.fit(module, Batches())
    before = flat(trainer)
    trainer.fit_loop.max_epochs = 2
    watch = Watch()
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(module, Batches())
    assert torch.equal(before, watch.masks[0]), "the second optimizer has no momentum yet, and nothing is to move"
    assert int(before.sum()) == int(flat(trainer).sum())


def test_another_module_gets_masks_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Static(density=0.3, seed=4), max_epochs=1)
    trainer.fit(Net(), Batches())
    other = Net()
    other.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, Batches())
    assert list(trainer.strategy.masks) == ["net.1.weight"]  # type: ignore[attr-defined]


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_has_stock_keys_zeros_and_masks(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, SparseMomentum(density=0.3)), Net()
    trainer.fit(module, Batches())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    assert list(checkpoint["sparsity"]["masks"]) == ["net.0.weight", "net.4.weight", "net.6.weight"]
    for name, mask in checkpoint["sparsity"]["masks"].items():
        assert mask.dtype == torch.bool
        assert not checkpoint["state_dict"][name][~mask].any()
        assert torch.equal(checkpoint["state_dict"][name], module.state_dict()[name])
    stock = Net.load_from_checkpoint(tmp_path / "saved.ckpt")
    trainer.test(module, Batches(), verbose=False)
    alone = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert alone.test(stock, Batches(), verbose=False) == trainer.test(module, Batches(), verbose=False)


def test_averages_are_cut_to_the_mask_when_saved_and_at_the_end(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=10)
    callbacks = [EMAWeightAveraging(decay=0.7), keep]
    trainer, module = trainer_of(
        tmp_path, SparseMomentum(density=0.3), callbacks=callbacks, enable_checkpointing=True
    ), Net()  # fmt: skip
    trainer.fit(module, Batches())
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    assert "current_model_state" in saved
    states = [(saved["state_dict"], saved["sparsity"]["masks"]), (module.state_dict(), trainer.strategy.masks)]  # type: ignore[attr-defined]
    for state, masks in states:
        for name, mask in masks.items():
            assert not state[name][~mask].any()


def test_a_dense_checkpoint_keeps_its_largest_weights(tmp_path: Path) -> None:
    dense = Net()
    alone = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    alone.fit(dense, Batches())
    alone.save_checkpoint(tmp_path / "dense.ckpt")
    trainer, watch = trainer_of(tmp_path, Static(density=0.3), callbacks=[watch := Watch()], max_epochs=2), watch
    trainer.fit(Net(), Batches(), ckpt_path=tmp_path / "dense.ckpt", weights_only=False)
    weight = dense.net[4].weight.detach().abs()
    mask = trainer.strategy.masks["net.4.weight"]  # type: ignore[attr-defined]
    assert int(mask.sum()) == round(0.3 * 512)
    assert weight[mask].min() >= weight[~mask].max()


def test_masks_of_other_layers_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, Static(density=0.3), max_epochs=1), Net()
    trainer.fit(module, Batches())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = trainer_of(tmp_path, Static(density=0.3, dense=["net.0"]), max_epochs=2)
    with pytest.raises(ValueError, match=r"mask for net.0.weight .* same `dense`"):
        again.fit(Net(), Batches(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (lambda: Static(density=0.05, dense=["net.0"]), r"density=0\.3, and this one has density=0\.05: give it"),
        (lambda: Static(density=0.3, dense=None), r"left net\.0 whole, .* give it dense=\['net\.0'\]"),
    ],
)  # fmt: skip
def test_other_settings_than_the_checkpoint_s_are_refused(
    tmp_path: Path, algorithm: Callable[[], SparseAlgorithm], words: str
) -> None:
    trainer = trainer_of(tmp_path, Static(density=0.3, dense=["net.0"]), max_epochs=1)
    trainer.fit(Net(), Batches())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    for more, made in (({"max_epochs": 2}, algorithm()), ({"max_epochs": 1}, Static(density=0.3, dense=["net.0"]))):
        again = trainer_of(tmp_path, made, **more)
        if more["max_epochs"] == 1:
            again.fit(Net(), Batches(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
            continue
        with pytest.raises(MisconfigurationException, match=words):
            again.fit(Net(), Batches(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)


def test_compressed_files_are_read_whatever_their_names_are(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, Static(density=0.3), max_epochs=1), Net()
    trainer.fit(module, Batches())
    save_compressed(module.state_dict(), tmp_path / "weights.ckpt")
    whole = {"plugins": CompressedCheckpointIO(), "max_epochs": 1}
    writer = trainer_of(tmp_path, Static(density=0.3), **whole)
    writer.fit(Net(), Batches())
    writer.save_checkpoint(tmp_path / "whole.ckpt")
    for name in ("weights.ckpt", "whole.ckpt"):
        trainer.test(tested := Net(), Batches(), ckpt_path=tmp_path / name, verbose=False)
        expected = load_compressed(tmp_path / name)
        assert all(torch.equal(tested.state_dict()[key], expected[key]) for key in expected)
    begun = trainer_of(tmp_path, Static(density=0.3), max_epochs=2)
    begun.fit(Net(), Batches(), ckpt_path=tmp_path / "weights.ckpt")
    assert begun.global_step == 8
    assert torch.equal(begun.strategy.masks["net.4.weight"], module.net[4].weight != 0)  # type: ignore[attr-defined]
    resumed = trainer_of(tmp_path, Static(density=0.3), max_epochs=2)
    resumed.fit(Net(), Batches(), ckpt_path=tmp_path / "whole.ckpt")
    assert (resumed.global_step, resumed.current_epoch) == (8, 2)
    assert torch.equal(flat(resumed), flat(writer))


# ------------------------------------------------------------------ metrics and errors


@pytest.mark.parametrize("kind", ["sparse_momentum", "rigl"])
def test_every_run_says_what_it_did(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = CSVLogger(tmp_path, version=0)
    trainer, module = trainer_of(tmp_path, MAKERS[kind](), logger=logger, log_every_n_steps=1), Net()
    trainer.fit(module, Batches())
    metrics = trainer.callback_metrics
    live = {name: float(mask.sum()) / mask.numel() for name, mask in trainer.strategy.masks.items()}  # type: ignore[attr-defined]
    if kind == "sparse_momentum":
        for name, density in live.items():
            assert float(metrics[f"density/{name.removesuffix('.weight')}"]) == pytest.approx(density)
        # The third epoch began with an update at two thirds of the cosine from 0.5 to 0.005.
        assert float(metrics["sparsity/prune_rate"]) == pytest.approx(0.005 + 0.495 / 4)
        assert float(metrics["sparsity/num_grown"]) > 0
    total = sum(mask.numel() for mask in trainer.strategy.masks.values())  # type: ignore[attr-defined]
    expected = sum(float(mask.sum()) for mask in trainer.strategy.masks.values()) / total  # type: ignore[attr-defined]
    assert float(metrics["density/total"]) == pytest.approx(expected)
    assert "density/net.4" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "net.4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: trainer_of(".", None, "both"), {}, "inner='both' must be one of single, ddp"),
        (lambda: trainer_of(".", "rigl"), {}, "must be an algorithm"),  # type: ignore[arg-type]
        (lambda: trainer_of(".", None, "single", devices=2), {}, r"devices=2 asks for more: use .*inner='ddp'"),
    ],
)
def test_what_can_t_be_is_refused_at_once(make: Callable[[], Trainer], options: Any, words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        make()


class NoBatch(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        raise AssertionError("an error came after the first batch")


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        (SparseMomentum(dense=["net.9"]), {}, "no layer is called 'net.9'"),
        (SparseMomentum(dense=["*"]), {}, "No layer is left"),
        (SparseMomentum(), {"max_epochs": -1}, "give the Trainer max_epochs or max_steps"),
    ],
)
def test_what_is_wrong_with_layers_and_lengths_comes_before_the_first_batch(
    tmp_path: Path, algorithm: SparseAlgorithm, options: Any, words: str
) -> None:
    with pytest.raises(ValueError if "max_epochs" not in options else MisconfigurationException, match=words):
        trainer_of(tmp_path, algorithm, callbacks=[NoBatch()], **options).fit(Net(), Batches())


def test_updates_between_epochs_leave_the_last_epoch_alone(tmp_path: Path) -> None:
    watch = Watch()
    trainer_of(tmp_path, SparseMomentum(density=0.3), callbacks=[watch]).fit(Net(), Batches())
    changes = [not torch.equal(a, b) for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    assert [index + 1 for index, changed in enumerate(changes) if changed] == [4, 8]


def test_rigl_moves_every_so_many_steps_until_the_stop(tmp_path: Path) -> None:
    watch = Watch()
    algorithm = RigL(density=0.3, update_every=3, stop=0.6)
    trainer_of(tmp_path, algorithm, callbacks=[watch]).fit(Net(), Batches())
    changes = [not torch.equal(a, b) for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    assert [index + 2 for index, changed in enumerate(changes) if changed] == [3, 6]  # after these steps; 9 is too late
