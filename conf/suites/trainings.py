"""Trainings of small nets on Fashion-MNIST, a process and a thread each, for suites that ask how good they get."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from squall.conf.suites.cells import Cell, add_cell, digest, read_cells

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import Tensor

DENSE = "dense"  # the algorithm of cells that the others are compared with


def check(nets: Collection[str], seeds: Collection[int], num_processes: int, **by_net: Mapping[str, float]) -> None:
    """Refuse what nothing can be trained with.

    Args:
        nets: Names of :mod:`squall.models`.
        seeds: One training each.
        num_processes: Trainings at a time.
        by_net: Settings that every net needs one of, above 0: ``lr``, ``epochs``.

    Raises:
        ValueError: Which names the setting.

    """
    from squall import models

    if not nets or not seeds or num_processes < 1:
        raise ValueError("suite.nets and suite.seeds must not be empty, suite.num_processes not below 1.")
    for net in nets:
        if not hasattr(models, net):
            raise ValueError(f"suite.nets: squall.models has no {net!r}.")
        for name, values in by_net.items():
            if not values.get(net, 0) > 0:
                raise ValueError(f"suite.{name}.{net} must be above 0, and is {values.get(net)!r}.")


def of_nets(
    nets: Collection[str],
    seeds: Collection[int],
    epochs: Mapping[str, int],
    lr: Mapping[str, float],
    training: Mapping[str, Any],
    **common: Any,
) -> Iterator[Cell]:
    """Say what all trainings of a net and seed have in common.

    Args:
        nets: Names of :mod:`squall.models`.
        seeds: One training each.
        epochs: Of a training of each net.
        lr: First learning rate of each net.
        training: Further arguments of :class:`squall.models.ImageClassifier`.
        common: What is the same for all nets.

    """
    for seed in seeds:
        for net in nets:
            yield {**common, "net": net, "seed": seed, "epochs": epochs[net], "training": {**training, "lr": lr[net]}}


def train_cells(orders: Sequence[Cell], train: Callable[[Cell], Cell], path: Path, num_processes: int) -> list[Cell]:
    """Train every cell that a file doesn't have yet.

    Args:
        orders: What each training needs to know; ``net`` and ``algorithm`` are shown.
        train: Trains one, in another process.
        path: Where a line of JSON a cell goes, as it is done, and where it is looked for.
        num_processes: Trainings at a time.

    Returns:
        The cells, in their order.

    """
    known = dict(read_cells(path))
    left = [order for order in orders if digest(order) not in known]
    if left:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_begin)
        try:
            with Progress(TextColumn("{task.description:34}"), *columns) as progress:
                task = progress.add_task("trainings", total=len(orders), completed=len(orders) - len(left))
                futures = {pool.submit(train, order): order for order in left}
                for future in as_completed(futures):
                    name, cell = digest(futures[future]), future.result()
                    known[name] = cell
                    add_cell(path, name, cell)
                    progress.update(task, advance=1, description=f"{cell['net']}, {cell['algorithm']}")
        finally:
            pool.shutdown(cancel_futures=True)
    return [known[digest(order)] for order in orders]


def _begin() -> None:
    """Have a process compute with one thread, and be quiet."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # a sparse run prints its layers


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---------------------------------------------------------------------- in such a process


def fit(module: LightningModule, strategy: Any, order: Cell) -> float:
    """Train.

    Args:
        module: What to train.
        strategy: A Strategy, or its name.
        order: With ``epochs``, ``batch_size``, ``seed`` (of the images' order), and ``data``.

    Returns:
        Seconds that it took.

    """
    import torch
    from lightning.pytorch import Trainer

    images, labels, _, _ = load_images(order["data"])
    module.to(memory_format=torch.channels_last)  # in which oneDNN's convolutions of such nets take two thirds the time
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=order["epochs"], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.fit(module, Shuffled(images, labels, order["batch_size"], order["seed"]))
    return time.perf_counter() - begin


def accuracy(module: LightningModule, order: Cell) -> float:
    """Test, on the images that nothing was trained with.

    Args:
        module: What was trained.
        order: With ``data``.

    Returns:
        The part of them that is recognised.

    """
    import torch

    _, _, images, labels = load_images(order["data"])
    module.eval()
    with torch.inference_mode():
        guesses = torch.cat([module(part).argmax(1) for part in images.split(500)])
    return float((guesses == labels).float().mean())


class Shuffled:
    """Batches of images in memory, in an order of each epoch's own.

    Args:
        images: All of them.
        labels: Theirs.
        batch_size: Images in a batch.
        seed: Of the orders.

    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        import torch

        self._images, self._labels, self._batch_size = images, labels, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        for chosen in torch.randperm(len(self._images), generator=self._generator).split(self._batch_size):
            yield self._images[chosen], self._labels[chosen]


_loaded: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}


def load_images(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load all images, normalised once for all trainings of this process.

    Args:
        arguments: Of :class:`squall.models.FashionMNISTDataModule`.

    Returns:
        Images and labels to train on, and those to test with.

    """
    from squall.models import FashionMNISTDataModule

    name = digest(arguments)
    if name not in _loaded:
        data = FashionMNISTDataModule(**{"max_shift": 0, "flip": False, **arguments})
        data.setup()
        train_set: Any = data.train_set
        test_set: Any = data.test_set
        _loaded[name] = (*train_set.__getitems__(range(len(train_set))), *test_set.__getitems__(range(len(test_set))))
    return _loaded[name]
