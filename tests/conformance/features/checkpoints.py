"""Saving, loading, resuming, on the same strategy and on others."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader, DistributedSampler

import squall
from squall.placement.checkpoint import is_distributed
from squall.placement.checkpoint import main as convert

from ..cell import Cell, Classifier, rest_of, samples, weights
from ..table import feature


class Adaptive(Classifier):
    """With optimizer and scheduler state that matters; in double from the start, so that loading rounds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _train(cell: Cell, strategy: Any = None, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    module = Adaptive()
    trainer = cell.trainer(strategy, **options)
    trainer.fit(module, cell.loader(), ckpt_path=ckpt_path, weights_only=False)
    return {**cell.after(trainer, module), "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0])}


def _first_epoch(cell: Cell, strategy: Any = None, **options: Any) -> Path:
    keep = ModelCheckpoint(dirpath=cell.path, filename="first", save_top_k=-1, every_n_epochs=1)
    _train(cell, strategy, max_epochs=1 + cell.more_epochs, callbacks=[keep], enable_checkpointing=True, **options)
    cell.barrier()  # AsyncCheckpointIO writes it while others go on
    return cell.path / "first.ckpt"


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@feature("trainer.save_checkpoint: loads without Squall")
def save_checkpoint(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Adaptive()
    trainer.fit(module, cell.loader())
    trainer.save_checkpoint(cell.path / "saved.ckpt")
    checkpoint = _load(cell.path / "saved.ckpt")
    stock = Adaptive()
    stock.load_state_dict(checkpoint["state_dict"])
    lightning = Adaptive.load_from_checkpoint(cell.path / "saved.ckpt", weights_only=False)
    return {
        "weights": weights(stock),
        "again": weights(lightning),
        "optimizer": checkpoint["optimizer_states"],
        "keys": sorted(checkpoint),
    }


@feature("trainer.save_checkpoint in a hook, and weights_only=True")
def save_in_hook(cell: Cell) -> dict[str, Any]:
    class Saving(Adaptive):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.trainer.save_checkpoint(cell.path / "middle.ckpt", weights_only=True)

    trainer, module = cell.trainer(max_epochs=1), Saving()
    trainer.fit(module, cell.loader())
    middle = _load(cell.path / "middle.ckpt")
    assert "optimizer_states" not in middle
    return {"middle": middle["state_dict"], **cell.after(trainer, module)}


@feature("resume from the end of an epoch")
def resume_epoch(cell: Cell) -> dict[str, Any]:
    straight = _train(cell)
    resumed = _train(cell, ckpt_path=_first_epoch(cell))
    if not cell.entry.exact:
        return resumed
    for key, value in straight["weights"].items():
        torch.testing.assert_close(resumed["weights"][key], value, rtol=1e-9, atol=1e-12)
    return resumed


@feature("resume mid-epoch")
def resume_middle(cell: Cell) -> dict[str, Any]:
    keep = ModelCheckpoint(dirpath=cell.path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    straight = _train(cell, callbacks=[keep], enable_checkpointing=True)
    first = min(cell.path.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert first.stem == "step=3" or not cell.entry.exact
    resumed = _train(cell, ckpt_path=first)
    return rest_of(cell, resumed, straight)


@feature("resume: one device's checkpoint under this strategy")
def resume_from_single(cell: Cell) -> dict[str, Any]:
    return _train(cell, ckpt_path=_reference_checkpoint(cell, cell.path / "alone.ckpt"))


def _reference_checkpoint(cell: Cell, path: Path) -> Path:
    """An epoch of Adam by hand, as one device's Trainer saves it: every rank computes it, the first one's is read."""
    module = Adaptive()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for x, y in DataLoader(samples(16), batch_size=4):
        optimizer.zero_grad()
        module.loss((x.double(), y)).backward()
        optimizer.step()
        schedule.step()
    template = _load(_first_epoch(cell))
    template["state_dict"] = module.state_dict()
    template["optimizer_states"] = [optimizer.state_dict()]
    template["lr_schedulers"] = [schedule.state_dict()]
    template.pop("sparsity", None)  # which one device has not
    if cell.rank == 0:
        torch.save(template, path)
    cell.barrier()
    return path


@feature("resume: this strategy's checkpoint under ddp, and ddp's under this one")
def resume_across(cell: Cell) -> dict[str, Any]:
    other = "auto" if cell.entry.num_ranks == 1 else "ddp"
    mine, theirs = _first_epoch(cell), cell.path / "theirs.ckpt"
    _fit_alike(cell, other, None, max_epochs=1).save_checkpoint(theirs)
    away = _fit_alike(cell, other, mine)
    home = _train(cell, ckpt_path=theirs)
    assert away.lightning_module is not None
    return {"away": weights(away.lightning_module), "home": home["weights"], "optimizer": home["optimizer"]}


def _fit_alike(cell: Cell, strategy: str, path: Path | None, **options: Any) -> Trainer:
    """Train under Lightning's DDP (or one device) with equal batches on every rank: the average is each one's own."""
    trainer = cell.trainer(strategy, use_distributed_sampler=False, **options)
    trainer.fit(Adaptive(), DataLoader(samples(16), batch_size=4), ckpt_path=path, weights_only=False)
    return trainer


@feature("save_distributed_checkpoint, its converter, and other columns")
def distributed_checkpoint(cell: Cell) -> dict[str, Any]:
    if not cell.has_columns:
        path = _first_epoch(cell)
        return {"saved": _load(path)["state_dict"], **_train(cell, ckpt_path=path)}
    written = _first_epoch(cell, squall.ColumnParallelStrategy(save_distributed_checkpoint=True))
    assert is_distributed(written)
    whole, back = cell.path / "whole.ckpt", cell.path / "back.ckpt"
    if cell.rank == 0:
        with redirect_stdout(io.StringIO()):
            assert convert([str(written), str(whole)]) == 0
            assert convert([str(whole), str(back)]) == 0
            assert convert([str(whole), str(back)]) == 1  # never overwrites
    torch.distributed.barrier()
    ranks = cell.entry.num_ranks
    results = []
    for columns, path, distributed in (
        (2, written, True), (2, written, False), (1, back, True), (ranks, written, True), (ranks, whole, False),
    ):  # fmt: skip
        strategy = squall.ColumnParallelStrategy(columns, save_distributed_checkpoint=distributed)
        module = Adaptive()
        trainer = cell.trainer(strategy, use_distributed_sampler=False)
        trainer.fit(module, _dealt_loader(cell, strategy), ckpt_path=path, weights_only=False)
        results.append(cell.after(trainer, module))
    last = _train(cell, ckpt_path=whole)
    for result in results:
        for key, value in last["weights"].items():
            torch.testing.assert_close(result["weights"][key], value, rtol=1e-9, atol=1e-12)
    return {"saved": _load(whole)["state_dict"], **last}


def _dealt_loader(cell: Cell, strategy: Any) -> Any:
    replicas = cell.entry.num_ranks // strategy.num_columns
    data = samples(16)
    sampler = DistributedSampler(data, replicas, cell.rank // strategy.num_columns, shuffle=False)
    return DataLoader(data, batch_size=4 // replicas, sampler=sampler)


@feature("AsyncCheckpointIO")
def async_checkpoint(cell: Cell) -> dict[str, Any]:
    path = _first_epoch(cell, plugins=[AsyncCheckpointIO()])
    return {"saved": _load(path)["state_dict"], **_train(cell, ckpt_path=path)}


@feature("on_save_checkpoint, on_load_checkpoint")
def checkpoint_hooks(cell: Cell) -> dict[str, Any]:
    class Hooked(Adaptive):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["sums"] = {key: float(value.sum()) for key, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.sums = checkpoint["sums"]

    trainer = cell.trainer(max_epochs=1)
    trainer.fit(Hooked(), cell.loader())
    trainer.save_checkpoint(cell.path / "hooked.ckpt")
    again, trainer = Hooked(), cell.trainer(max_epochs=2)
    trainer.fit(again, cell.loader(), ckpt_path=cell.path / "hooked.ckpt", weights_only=False)
    return {"sums": again.sums, **cell.after(trainer, again)}
