"""Runs that break off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from ..cell import Cell, Classifier
from ..table import feature


class Broken(Classifier):
    """Raises in a hook, in the third batch."""

    def __init__(self, error: BaseException, here: bool = True) -> None:
        super().__init__()
        self.error, self.here = error, here

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.here:
            raise self.error


@feature("exception in a hook")
def exception(cell: Cell) -> dict[str, Any]:
    module = Broken(ArithmeticError("on purpose"))
    with pytest.raises(ArithmeticError, match="on purpose"):
        cell.fit(module)
    if cell.has_columns:
        with pytest.raises(RuntimeError, match="Load the last checkpoint"):
            module(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    return {"steps": module.trainer.global_step}


@feature("exception in a hook of one rank: the others end")
def exception_of_one(cell: Cell) -> dict[str, Any]:
    last = cell.rank == cell.entry.num_ranks - 1
    module = Broken(ArithmeticError("on purpose"), here=last)
    with pytest.raises(ArithmeticError if last else RuntimeError) as caught:
        cell.fit(module)
    if last:
        assert "on purpose" in str(caught.value)
    return {}


@feature("KeyboardInterrupt")
def interrupt(cell: Cell) -> dict[str, Any]:
    module = Broken(KeyboardInterrupt())
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        cell.fit(module)
    return {"interrupted": module.trainer.interrupted}


@feature("OnExceptionCheckpoint, and resuming from it")
def exception_checkpoint(cell: Cell) -> dict[str, Any]:
    watching = OnExceptionCheckpoint(cell.path, "broken")
    with pytest.raises(ArithmeticError, match="on purpose"):
        cell.fit(Broken(ArithmeticError("on purpose")), callbacks=[watching], enable_checkpointing=True)
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, cell.loader(), ckpt_path=cell.path / "broken.ckpt", weights_only=False)
    return cell.after(trainer, module)


@feature("a fit after one that broke off")
def again(cell: Cell) -> dict[str, Any]:
    with pytest.raises(ArithmeticError, match="on purpose"):
        cell.fit(Broken(ArithmeticError("on purpose")))
    return cell.fit(Classifier())
