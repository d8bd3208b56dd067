"""Callbacks, loggers, profilers and the tuner."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize

from ..cell import Cell, Classifier, Unlike, metrics, weights
from ..table import ASYNCHRONOUS, DDP, SANDBLASTER, STRATEGIES, feature


@feature("ModelCheckpoint: top k and last")
def model_checkpoint(cell: Cell) -> dict[str, Any]:
    callback = ModelCheckpoint(
        dirpath=cell.path / "kept", filename="{epoch}", monitor="val_loss", mode="max", save_top_k=2, save_last=True
    )
    observed = cell.fit(Classifier(), max_epochs=4 + cell.more_epochs, enable_checkpointing=True, callbacks=[callback])
    names = sorted(path.name for path in (cell.path / "kept").iterdir())
    assert "last.ckpt" in names
    assert len(names) == 3
    states = {name: torch.load(cell.path / "kept" / name, weights_only=False)["state_dict"] for name in names}
    return {**observed, "states": states, "best": float(callback.best_model_score)}  # type: ignore[arg-type]


@feature("ModelCheckpoint every n steps, then test(ckpt_path='best')")
def checkpoint_steps(cell: Cell) -> dict[str, Any]:
    callback = ModelCheckpoint(dirpath=cell.path / "kept", every_n_train_steps=3, save_top_k=-1, monitor="train_loss")
    module = Classifier()
    trainer = cell.trainer(enable_checkpointing=True, callbacks=[callback])
    trainer.fit(module, cell.loader(), cell.loader(8))
    trainer.test(module, cell.loader(8), ckpt_path="best", verbose=False)
    names = sorted(path.name for path in (cell.path / "kept").iterdir())
    return {"names": names, **cell.after(trainer, module)}


@feature("EarlyStopping")
def early_stopping(cell: Cell) -> dict[str, Any]:
    observed = cell.fit(
        Classifier(), max_epochs=6, callbacks=[EarlyStopping("val_loss", mode="max", patience=1, min_delta=0.1)]
    )
    assert observed["epochs"] < 6
    return observed


@feature("LearningRateMonitor")
def learning_rate_monitor(cell: Cell) -> dict[str, Any]:
    class Decaying(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    monitor = LearningRateMonitor("epoch")
    logger = CSVLogger(cell.path, name="csv", version=0)
    observed = cell.fit(Decaying(), callbacks=[monitor], logger=logger)
    rates = {name: [float(rate) for rate in rates] for name, rates in monitor.lrs.items()}
    return {**observed, "rates": rates}


@feature("StochasticWeightAveraging")
def swa(cell: Cell) -> dict[str, Any]:
    callback = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    return cell.fit(Classifier(), max_epochs=4, callbacks=[callback])


# Its average is kept in single precision, whatever the module computes in.
@feature("WeightAveraging", tolerance=1e-6)
def weight_averaging(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), max_epochs=2, callbacks=[WeightAveraging()])


@feature("EMAWeightAveraging, with its checkpoint", tolerance=1e-6)
def ema(cell: Cell) -> dict[str, Any]:
    module = Classifier()
    trainer = cell.trainer(callbacks=[EMAWeightAveraging(decay=0.7)])
    trainer.fit(module, cell.loader(), cell.loader(8))
    return cell.after(trainer, module)


@feature("EMAWeightAveraging: saved and resumed", tolerance=1e-4)
def ema_resumed(cell: Cell) -> dict[str, Any]:
    keep = ModelCheckpoint(dirpath=cell.path, filename="ema", save_top_k=-1)
    module = Classifier()
    trainer = cell.trainer(
        max_epochs=1 + cell.more_epochs,
        precision="32-true",
        enable_checkpointing=True,
        callbacks=[EMAWeightAveraging(decay=0.7), keep],
    )
    trainer.fit(module, cell.loader(), cell.loader(8))
    saved = torch.load(cell.path / "ema.ckpt", weights_only=False)
    again = Classifier()
    trainer = cell.trainer(precision="32-true", callbacks=[EMAWeightAveraging(decay=0.7)])
    trainer.fit(again, cell.loader(), cell.loader(8), ckpt_path=str(cell.path / "ema.ckpt"), weights_only=False)
    return {"saved": saved["state_dict"], "current": saved["current_model_state"], **cell.after(trainer, again)}


@feature("GradientAccumulationScheduler", errors=dict.fromkeys(SANDBLASTER, "GradientAccumulationScheduler"))
def accumulation_scheduler(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), max_epochs=3, callbacks=[GradientAccumulationScheduler({1: 2, 2: 4})])


@feature(
    "BackboneFinetuning",
    errors={
        **dict.fromkeys((*ASYNCHRONOUS, *SANDBLASTER), "BackboneFinetuning gives the optimizer more"),
        "hybrid_parallel": "trains nothing but linear layers",
    },
    wrong=dict.fromkeys(DDP, "never averages what was frozen when it wrapped the module"),
)
def finetuning(cell: Cell) -> dict[str, Any]:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.network[:6]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=self.lr)

    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False)
    return cell.fit(Tuned(), max_epochs=3, callbacks=[callback])


@feature("ModelSummary")
def model_summary(cell: Cell) -> dict[str, Any]:
    shown: list[str] = []

    class Summary(ModelSummary):
        @staticmethod
        def summarize(*args: Any, **kwargs: Any) -> None:
            shown.append(str(args[0]))

    class Exemplary(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(2, 3, 8, 8, dtype=torch.float64)

    module = Exemplary()
    observed = cell.fit(module, max_epochs=1, enable_model_summary=True, callbacks=[Summary(max_depth=2)])
    assert bool(shown) == (cell.rank == 0)
    return {**observed, "summary": str(summarize(module, max_depth=2))}


@feature("progress bars")
def progress_bars(cell: Cell) -> dict[str, Any]:
    class Shown(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("shown", loss, prog_bar=True, sync_dist=True)
            return loss

    cell.fit(Shown(), enable_progress_bar=True, callbacks=[TQDMProgressBar(refresh_rate=1)], max_epochs=1)
    return cell.fit(Shown(), enable_progress_bar=True, callbacks=[RichProgressBar()], max_epochs=1)


@feature("Timer, DeviceStatsMonitor, OnExceptionCheckpoint")
def watchers(cell: Cell) -> dict[str, Any]:
    logger = CSVLogger(cell.path, name="csv", version=0)
    watching: list[Callback] = [Timer(duration={"hours": 1}), DeviceStatsMonitor(cpu_stats=False)]
    watching.append(OnExceptionCheckpoint(cell.path / "broken"))
    return cell.fit(Classifier(), callbacks=watching, logger=logger, log_every_n_steps=1, enable_checkpointing=True)


@feature("loggers: CSV and TensorBoard with its graph")
def loggers(cell: Cell) -> dict[str, Any]:
    class Exemplary(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
            self.save_hyperparameters({"lr": 0.1})

    both = [CSVLogger(cell.path, "csv", version=0), TensorBoardLogger(cell.path, "tb", version=0, log_graph=True)]
    observed = cell.fit(Exemplary(), logger=both, log_every_n_steps=1)
    if cell.rank == 0:
        assert (cell.path / "csv" / "version_0" / "metrics.csv").is_file()
        assert list((cell.path / "tb" / "version_0").glob("events*"))
    return observed


@feature("profiler")
def profiler(cell: Cell) -> dict[str, Any]:
    cell.fit(Classifier(), profiler="simple", max_epochs=1)
    return cell.fit(Classifier(), profiler="advanced", max_epochs=1)


@feature("Tuner.lr_find")
def lr_find(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Classifier(lr=0.02)
    found = Tuner(trainer).lr_find(
        module, cell.loader(), min_lr=1e-3, max_lr=1, num_training=12, early_stop_threshold=None
    )
    assert found is not None
    after = weights(module)  # as they were
    trainer.fit(module, cell.loader())
    # Lightning takes rank 0's losses, which are those of its replica.
    losses = found.results["loss"] if cell.num_replicas == 1 else Unlike()
    return {"rates": found.results["lr"], "losses": losses, "restored": after, "weights": weights(module)}


_NOT_DISTRIBUTED = "(Tuning the batch size is currently|The Batch size finder is) not supported with distributed"
_ALL_DISTRIBUTED = {entry.name: _NOT_DISTRIBUTED for entry in STRATEGIES if entry.name not in ("single", "sparse")}


@feature("Tuner.scale_batch_size", errors=_ALL_DISTRIBUTED)
def scale_batch_size(cell: Cell) -> dict[str, Any]:
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return cell.loader(64, self.batch_size * cell.num_replicas)

        def val_dataloader(self) -> Any:
            return cell.loader(8)

    trainer, module = cell.trainer(callbacks=[]), Sized()
    size = Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=2)
    return {"size": size, "weights": weights(module)}


@feature("BatchSizeFinder", errors=_ALL_DISTRIBUTED)
def batch_size_finder(cell: Cell) -> dict[str, Any]:
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return cell.loader(32, self.batch_size * cell.num_replicas)

        def val_dataloader(self) -> Any:
            return cell.loader(8)

    module = Sized()
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=1)
    trainer = cell.trainer(callbacks=[finder], max_epochs=1)
    trainer.fit(module)
    return {"size": module.batch_size}


# Lightning rewinds to weights of which the module's become an alias, and which one device then trains on.
@feature(
    "ModelPruning",
    tolerance=1e-4,
    wrong={"hogwild": "rewinds to the first weights each time, not to an alias that is trained on"},
)
def pruning(cell: Cell) -> dict[str, Any]:
    module = Classifier()
    layers = [(module.network[2], "weight"), (module.network[8], "weight")]
    callback = ModelPruning("l1_unstructured", parameters_to_prune=layers, amount=0.5, use_global_unstructured=False)
    trainer = cell.trainer(callbacks=[callback], precision="32-true")
    trainer.fit(module, cell.loader())
    return {"weights": weights(module), "metrics": metrics(trainer)}
