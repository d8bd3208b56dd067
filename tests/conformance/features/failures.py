"""Runs that break off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from ..cell import Cell, Classifier, rest_of
from ..table import feature


class Broken(Classifier):
    """Raises in a hook: in the third batch, or in the first where nobody knows how many a rank will get."""

    def __init__(self, error: BaseException, cell: Cell, here: bool = True) -> None:
        super().__init__()
        self.error, self.here = error, here and (cell.entry.exact or cell.rank == 0)
        self.at = 2 if cell.entry.exact else 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at and self.here:
            raise self.error


def _raises(cell: Cell, *kinds: type[BaseException], match: str | None = None) -> AbstractContextManager[Any]:
    """What the leader raises, without which the others of an asynchronous run end, or have ended."""
    if cell.entry.exact or cell.rank == 0:
        return pytest.raises(kinds, match=match)
    return suppress(RuntimeError)


@feature("exception in a hook")
def exception(cell: Cell) -> dict[str, Any]:
    module = Broken(ArithmeticError("on purpose"), cell)
    with _raises(cell, ArithmeticError, match="on purpose"):
        cell.fit(module)
    if cell.has_columns:
        with pytest.raises(RuntimeError, match="Load the last checkpoint"):
            module(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    return {"steps": module.trainer.global_step if cell.entry.exact else 0}


@feature("exception in a hook of one rank: the others end, or do without it")
def exception_of_one(cell: Cell) -> dict[str, Any]:
    last = cell.rank == cell.entry.num_ranks - 1
    module = Broken(ArithmeticError("on purpose"), cell, here=last)
    module.here = last
    if not cell.entry.exact:
        with suppress(ArithmeticError) if last else nullcontext():
            cell.fit(module)
        return {}
    with pytest.raises(ArithmeticError if last else RuntimeError) as caught:
        cell.fit(module)
    if last:
        assert "on purpose" in str(caught.value)
    return {}


@feature("KeyboardInterrupt")
def interrupt(cell: Cell) -> dict[str, Any]:
    module = Broken(KeyboardInterrupt(), cell)
    with _raises(cell, SystemExit, KeyboardInterrupt):
        cell.fit(module)
    return {"interrupted": module.trainer.interrupted}


@feature("OnExceptionCheckpoint, and resuming from it")
def exception_checkpoint(cell: Cell) -> dict[str, Any]:
    watching = OnExceptionCheckpoint(cell.path, "broken")
    with _raises(cell, ArithmeticError, match="on purpose"):
        cell.fit(Broken(ArithmeticError("on purpose"), cell), callbacks=[watching], enable_checkpointing=True)
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, cell.loader(), ckpt_path=cell.path / "broken.ckpt", weights_only=False)
    # Loading into a module that is not in double precision yet rounds the weights.
    return rest_of(cell, cell.after(trainer, module), cell.fit(Classifier()), rtol=1e-5)


@feature("a fit after one that broke off")
def again(cell: Cell) -> dict[str, Any]:
    with _raises(cell, ArithmeticError, match="on purpose"):
        cell.fit(Broken(ArithmeticError("on purpose"), cell))
    return cell.fit(Classifier())
