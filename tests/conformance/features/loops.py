"""The Trainer's loops."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..cell import Cell, Classifier, Dealt, metrics, samples, weights
from ..table import SANDBLASTER, feature


class CountValidations(Callback):
    def __init__(self) -> None:
        self.at: list[int] = []
        self.num_batches = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.num_batches += not trainer.sanity_checking


@feature("fit")
def fit(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier())


@feature("validate")
def validate(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Classifier()
    result = trainer.validate(module, cell.loader(), verbose=False)
    return {"result": result, **cell.after(trainer, module)}


@feature("test")
def test(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Classifier()
    result = trainer.test(module, cell.loader(), verbose=False)
    return {"result": result, **cell.after(trainer, module)}


@feature("predict")
def predict(cell: Cell) -> dict[str, Any]:
    predictions = cell.trainer().predict(Classifier(), cell.loader(12))
    assert predictions is not None
    for prediction in predictions:
        assert type(prediction) is torch.Tensor
    return {"predictions": Dealt(torch.cat(predictions))}  # type: ignore[arg-type]


@feature("fit, then validate, test and predict with one Trainer")
def fit_then_test(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, cell.loader(), cell.loader(8))
    results = [
        trainer.validate(module, cell.loader(8), verbose=False), trainer.test(module, cell.loader(12), verbose=False),
    ]  # fmt: skip
    predictions = trainer.predict(module, cell.loader(8))
    return {"results": results, "predictions": Dealt(torch.cat(predictions)), "weights": weights(module)}  # type: ignore[arg-type]


@feature("fit twice with one Trainer, then call the module")
def fit_twice(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(max_epochs=1), Classifier()
    trainer.fit(module, cell.loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, cell.loader())
    x, _ = samples(3)[:]
    output = module(x.double())
    output.sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "grads": grads, **cell.after(trainer, module)}


@feature("fast_dev_run")
def fast_dev_run(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), fast_dev_run=2)


@feature("limit_train_batches, limit_val_batches")
def limit_batches(cell: Cell) -> dict[str, Any]:
    counter = CountValidations()
    observed = cell.fit(Classifier(), limit_train_batches=3, limit_val_batches=0.5, callbacks=[counter])
    return {**observed, "validation batches": counter.num_batches}


@feature("overfit_batches")
def overfit_batches(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), overfit_batches=1, max_epochs=3)


@feature("val_check_interval")
def val_check_interval(cell: Cell) -> dict[str, Any]:
    counter = CountValidations()
    observed = cell.fit(Classifier(), val_check_interval=2, callbacks=[counter])
    return {**observed, "validated at": counter.at}


@feature("check_val_every_n_epoch")
def check_val_every_n_epoch(cell: Cell) -> dict[str, Any]:
    counter = CountValidations()
    observed = cell.fit(Classifier(), check_val_every_n_epoch=2, max_epochs=3, callbacks=[counter])
    return {**observed, "validated at": counter.at}


@feature("max_steps")
def max_steps(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), max_epochs=-1, max_steps=6)


@feature("accumulate_grad_batches", errors=dict.fromkeys(SANDBLASTER, "accumulate_grad_batches=3"))
def accumulate(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), accumulate_grad_batches=3)


@feature("several validation loaders")
def several_loaders(cell: Cell) -> dict[str, Any]:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

    trainer, module = cell.trainer(), Several()
    trainer.fit(module, cell.loader(), [cell.loader(8), cell.loader(12)])
    return cell.after(trainer, module)


@feature(
    "reload_dataloaders_every_n_epochs",
    errors=dict.fromkeys(SANDBLASTER, "reload_dataloaders_every_n_epochs=1: a line search needs"),
)
def reload_loaders(cell: Cell) -> dict[str, Any]:
    class Reloading(Classifier):
        def train_dataloader(self) -> Any:
            return cell.loader(8 + 4 * self.trainer.current_epoch)

    trainer, module = cell.trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3), Reloading()
    trainer.fit(module)
    return cell.after(trainer, module)


@feature("trainer.should_stop")
def should_stop(cell: Cell) -> dict[str, Any]:
    class Stopping(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 5:
                self.trainer.should_stop = True

    return cell.fit(Stopping(), max_epochs=4)


@feature("training_step that returns None, or a dictionary")
def skipped_steps(cell: Cell) -> dict[str, Any]:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return {"loss": loss, "logits": self(batch[0])}

    module = Skipping()
    trainer = cell.trainer()
    trainer.fit(module, cell.loader())
    return {"metrics": metrics(trainer), "weights": weights(module)}
