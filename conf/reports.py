"""Say at the end of a run what it did: accuracy, speed, parameters per rank, bytes moved per image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from squall.conf.writers import format_value, write_results

# How models call what they log, after the stage and a stroke: what a summary calls it, and how else it may be spelt.
METRIC_NAMES = {"accuracy": ("acc", "accuracy"), "loss": ("loss",), "accuracy_top5": ("acc_top5", "accuracy_top5")}


class Crossing(Protocol):
    """A place where ranks exchange what they compute.

    A Strategy that has any offers them as ``strategy.crossings``, a sequence of such records. All figures are
    what one rank sends for one image.
    """

    @property
    def name(self) -> str:
        """What crosses, as a rule the name of the layer that reads it."""

    @property
    def floats_per_image_forward(self) -> float:
        """Numbers that cross in the forward pass."""

    @property
    def floats_per_image_backward(self) -> float:
        """Numbers that cross in the backward pass."""

    @property
    def bytes_per_image(self) -> float:
        """Bytes, of both passes together."""


class GradientCrossing(NamedTuple):
    """The all-reduce of data parallelism: every gradient crosses, once a step whatever the batch."""

    name: str
    floats_per_image_forward: float
    floats_per_image_backward: float
    bytes_per_image: float


def crossings_of(trainer: Trainer, images_per_step: int) -> Sequence[Crossing]:
    """Find out what crosses between the ranks of a run.

    Args:
        trainer: A Trainer whose Strategy has set up the model.
        images_per_step: The global batch.

    Returns:
        The Strategy's own records; for DDP the gradients, as a share per image; otherwise nothing.

    """
    own = getattr(trainer.strategy, "crossings", None)
    if own is not None:
        return list(own() if callable(own) else own)
    if isinstance(trainer.strategy.model, DistributedDataParallel) and trainer.world_size > 1:
        gradients = [p for p in trainer.strategy.model.parameters() if p.requires_grad]
        # A ring sends every element around twice, less the part that is a rank's own.
        sends = 2 * (trainer.world_size - 1) / trainer.world_size / images_per_step
        floats = sends * sum(p.numel() for p in gradients)
        num_bytes = sends * sum(p.numel() * p.element_size() for p in gradients)
        return [GradientCrossing("gradients (all-reduce)", 0.0, floats, num_bytes)]
    return []


def num_held(module: torch.nn.Module) -> int:
    """Count the parameters that this process holds in memory.

    Args:
        module: Placed or not.

    Returns:
        Number of elements; what a Strategy has split counts with this rank's part only, whatever shape it shows.

    """
    storages = {}
    for parameter in module.parameters():
        storage = parameter.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() // parameter.element_size()
    return sum(storages.values())


class RunReport(Callback):
    """Measure a run, and write ``summary.md``, ``summary.json`` and a table on the console when it is tested.

    Training speed is images of all data-parallel ranks together per second, over the time between the ends of training
    batches; the first batches, validation and checkpoints don't count.

    Args:
        dirpath: Where the files go.
        warmup_batches: Training batches that aren't timed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RunReport("outputs")], logger=False)

    """

    def __init__(self, dirpath: str | Path, warmup_batches: int = 5) -> None:
        if warmup_batches < 0:
            raise ValueError(f"warmup_batches must be 0 or more, got {warmup_batches}.")
        self.dirpath = Path(dirpath)
        self.warmup_batches = warmup_batches
        self.summary: dict[str, Any] = {}
        self._began = 0.0
        self._batch_began = 0.0
        self._seconds = 0.0
        self._images = 0
        self._batches = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the whole fit."""
        self._began = time.perf_counter()
        self._seconds, self._images, self._batches = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the parameters each rank holds, now that the Strategy has placed the model."""
        own = num_held(pl_module)
        counts: list[int] = [own]
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            counts = [0] * distributed.get_world_size()
            distributed.all_gather_object(counts, own)
        self.summary = {
            "model": _name_of(pl_module),
            "strategy": type(trainer.strategy).__name__.removesuffix("Strategy"),
            "processes": trainer.world_size,
            "parameters_per_rank": counts,
        }

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch's first batch, its loading included."""
        self._batch_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch to the measured ones, once warm."""
        now = time.perf_counter()
        self._batches += 1
        sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        images = _batch_size(batch) * int(sampler.get("num_replicas", 1))
        if self._batches == 1:
            crossings = crossings_of(trainer, images * trainer.accumulate_grad_batches)
            self.summary["crossings"] = [
                {
                    "name": crossing.name,
                    "floats_per_image_forward": round(crossing.floats_per_image_forward),
                    "floats_per_image_backward": round(crossing.floats_per_image_backward),
                    "bytes_per_image": round(crossing.bytes_per_image),
                }
                for crossing in crossings
            ]
        if self._batches > self.warmup_batches:
            self._seconds += now - self._batch_began
            self._images += images
        self._batch_began = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation, which may fall between two training batches, out of their time."""
        self._batch_began = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known without a test."""
        self.summary["epochs"] = trainer.current_epoch
        self.summary["images_per_second"] = round(self._images / self._seconds, 1) if self._seconds else None
        self.summary["fit_seconds"] = round(time.perf_counter() - self._began, 1)
        self._add_metrics(trainer, "train", "val")
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it all."""
        self.summary.setdefault("model", _name_of(pl_module))
        self.summary.setdefault("strategy", type(trainer.strategy).__name__.removesuffix("Strategy"))
        self.summary.setdefault("processes", trainer.world_size)
        self._add_metrics(trainer, "test")
        self._write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print it all after a test, when the progress bar has left the console."""
        if stage == "test" and trainer.is_global_zero:
            Console().print(*self.tables(), f"[dim]{self.dirpath}[/dim]", sep="\n")

    def tables(self) -> list[Table]:
        """Lay the summary out.

        Returns:
            One table of figures, and one of crossings if there are any.

        """
        table = Table(title="What this run did", title_style="bold", show_header=False)
        table.add_column(style="cyan")
        table.add_column(justify="right")
        for name, value in self._lines().items():
            table.add_row(name, value)
        tables = [table]
        crossings = self.summary.get("crossings")
        if crossings:
            moved = Table(title="What each rank sends, per image", title_style="bold", show_footer=True)
            total = sum(c["bytes_per_image"] for c in crossings)
            moved.add_column("crossing", footer="together", style="cyan")
            for key, head in (("floats_per_image_forward", "floats ->"), ("floats_per_image_backward", "floats <-")):
                moved.add_column(head, justify="right", footer=format_value(sum(c[key] for c in crossings)))
            moved.add_column("bytes <->", justify="right", footer=format_value(total))
            for c in crossings:
                keys = ("floats_per_image_forward", "floats_per_image_backward", "bytes_per_image")
                moved.add_row(c["name"], *(format_value(c[key]) for key in keys))
            tables.append(moved)
        return tables

    def _lines(self) -> dict[str, str]:
        s = self.summary
        lines = {
            "model": s["model"],
            "strategy": f"{s['strategy']}, {s['processes']} process{'es' * (s['processes'] > 1)}",
        }
        for stage, name in (("test", "test accuracy"), ("val", "validation accuracy")):
            for kind, suffix in (("accuracy", ""), ("accuracy_top5", ", top 5")):
                if f"{stage}_{kind}" in s:
                    lines[name + suffix] = f"{100 * s[f'{stage}_{kind}']:.2f} %"
        if s.get("images_per_second"):
            lines["training speed"] = f"{format_value(s['images_per_second'])} images/s"
        if "parameters_per_rank" in s:
            counts = s["parameters_per_rank"]
            same = len(set(counts)) == 1
            lines["parameters per rank"] = format_value(counts[0]) if same else " + ".join(map(format_value, counts))
        if s.get("fit_seconds"):
            lines["time to fit"] = f"{s['fit_seconds']:.0f} s, {s['epochs']} epochs"
        return lines

    def _add_metrics(self, trainer: Trainer, *stages: str) -> None:
        metrics = trainer.callback_metrics
        for stage in stages:
            for kind, spellings in METRIC_NAMES.items():
                for name in (f"{stage}{mark}{spelling}" for mark in "/_" for spelling in spellings):
                    if name in metrics:
                        self.summary[f"{stage}_{kind}"] = round(float(metrics[name]), 6)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        rows = [{"": name, "value": value} for name, value in self._lines().items()]
        rows += [
            {"": f"bytes per image, {c['name']}", "value": format_value(c["bytes_per_image"])}
            for c in self.summary.get("crossings", [])
        ]
        write_results(self.dirpath / "summary", "What this run did", rows, extra={"summary": self.summary})


def _name_of(pl_module: LightningModule) -> str:
    inner = getattr(pl_module, "model", None)
    return type(inner if isinstance(inner, torch.nn.Module) else pl_module).__name__


def _batch_size(batch: Any) -> int:
    while isinstance(batch, list | tuple | dict):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)
