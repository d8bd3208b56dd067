"""Suite ``staleness``: what late gradients cost in test accuracy, by number of workers and by rule.

Run as a program, this is one of the workers. Held equal in every cell are the net and its first weights (by seed),
the samples and their order, the samples of an update, hence the number of updates, and the schedule of the learning
rate. A worker of Downpour makes an update of ``batch_size`` images by itself, from weights that others have moved
meanwhile; DDP's ranks make the same update together, of ``batch_size / workers`` each. What is left to differ is
staleness: none while the leader makes the updates of the warm start alone, if there is one, and as it comes after that.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from squall.conf.bench import SuiteResult
from squall.conf.suites.cells import Cell, add_cell, digest, read_cells
from squall.conf.suites.programs import Order, free_port, programs, serve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 0.5
_DDP = "ddp"


def measure(
    net: Mapping[str, Any],
    data: Mapping[str, Any],
    num_samples: int,
    batch_size: int,
    training: Mapping[str, Any],
    downpour: Mapping[str, Any],
    workers: Sequence[int],
    rules: Sequence[str],
    seeds: Sequence[int],
    results: str,
) -> SuiteResult:
    """Train every cell, except those that an earlier, interrupted run has.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        data: Arguments of :class:`squall.models.FashionMNISTDataModule`.
        num_samples: Training images of a cell, repeats counted.
        batch_size: Images of an update.
        training: Arguments of :class:`squall.models.ImageClassifier`: optimizer, rate and schedule, of every cell.
        downpour: Arguments of :class:`squall.DownpourStrategy`, of every cell without DDP.
        workers: Numbers of workers.
        rules: Its ``staleness_rule``.
        seeds: One training each.
        results: Where a line of JSON a cell goes, as it is done, and where it is looked for.

    Returns:
        Test accuracy of each number of workers and rule: mean and spread over the seeds.

    """
    _check(num_samples, batch_size, workers, seeds)
    settings = {
        "net": dict(net), "data": dict(data), "num_samples": num_samples, "batch_size": batch_size,
        "training": dict(training), "downpour": dict(downpour),
    }  # fmt: skip
    path = Path(results)
    mine = digest(settings)
    known = {(cell["workers"], cell["rule"], cell["seed"]): cell for name, cell in read_cells(path) if name == mine}
    wanted = [(number, rule, seed) for seed in seeds for number in workers for rule in _rules_of(number, rules)]
    left = [key for key in wanted if key not in known]
    if left:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            programs("squall.conf.suites.staleness", max(number for number, _, _ in left)) as ranks,
            Progress(TextColumn("{task.description:34}"), *columns) as progress,
        ):
            task = progress.add_task("", total=len(wanted), completed=len(wanted) - len(left))
            for number, rule, seed in left:
                progress.update(task, description=f"{number} workers, {rule}, seed {seed}")
                order = settings | {"workers": number, "rule": rule, "seed": seed, "port": free_port()}
                cell = ranks.ask({rank: order for rank in range(number)})[0]
                known[number, rule, seed] = cell
                add_cell(path, mine, cell)
                progress.advance(task)
    return _result([known[key] for key in wanted], settings, seeds)


def _check(num_samples: int, batch_size: int, workers: Sequence[int], seeds: Sequence[int]) -> None:
    for number in workers:
        if batch_size % number:
            raise ValueError(f"suite.batch_size={batch_size} can't be dealt out to suite.workers of {number} evenly.")
    if num_samples % batch_size or num_samples < batch_size:
        raise ValueError(f"suite.num_samples={num_samples} must be a multiple of suite.batch_size={batch_size}.")
    if not workers or not seeds:
        raise ValueError("suite.workers and suite.seeds must not be empty.")


def _rules_of(number: int, rules: Sequence[str]) -> list[str]:
    """A single worker is never late, and all rules are one."""
    return [_DDP, *(rules[:1] if number == 1 else rules)]


# ---------------------------------------------------------------------- the table and the picture


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each number of workers and rule, with DDP's row of the same number to compare with.

    Args:
        cells: One training each.

    """
    keys = list(dict.fromkeys((cell["workers"], cell["rule"]) for cell in cells))
    rows = []
    for number, rule in sorted(keys, key=lambda key: key[0]):
        accuracies = _accuracies(cells, number, rule)
        mine = [cell for cell in cells if (cell["workers"], cell["rule"]) == (number, rule)]
        rows.append(
            {
                "workers": number,
                "rule": "DDP" if rule == _DDP else "any" if number == 1 else rule,
                "test accuracy, %": statistics.mean(accuracies),
                "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "points above DDP": statistics.mean(accuracies) - statistics.mean(_accuracies(cells, number, _DDP)),
                "mean staleness": None if rule == _DDP else statistics.mean(cell["mean_staleness"] for cell in mine),
                "largest": None if rule == _DDP else max(cell["max_staleness"] for cell in mine),
                "updates": mine[0]["updates"],
                "seconds": statistics.mean(cell["seconds"] for cell in mine),
            }
        )
    return rows


def _accuracies(cells: Sequence[Cell], number: int, rule: str) -> list[float]:
    return [100 * cell["accuracy"] for cell in cells if (cell["workers"], cell["rule"]) == (number, rule)]


def _result(cells: Sequence[Cell], settings: Mapping[str, Any], seeds: Sequence[int]) -> SuiteResult:
    rows = summarize(cells)
    failures = []
    for number in dict.fromkeys(row["workers"] for row in rows):
        best = max(row["points above DDP"] for row in rows if row["workers"] == number and row["rule"] != "DDP")
        if best < -_POINTS:
            failures.append(f"{number} workers: the best rule is {-best:.2f} points below DDP, more than {_POINTS}.")
    notes = (
        f"AlexNet {settings['net']} on Fashion-MNIST: {settings['num_samples']:,} training images a cell in updates of"
        f" {settings['batch_size']}, {settings['training']}, Downpour with {settings['downpour']}; {len(seeds)} seeds."
        " Equal in every cell: first weights and order of samples (by seed), images of an update and so the number of"
        " updates, and the schedule. A worker of Downpour makes a whole update by itself; DDP's ranks make it together,"
        " so that their number changes nothing but rounding and random augmentation. Workers share the cores of one"
        " host; staleness is what was measured, not set, and its mean is of the updates after the warm start. A single"
        " worker's updates are never late: all rules are one."
    )
    return SuiteResult("Accuracy against staleness", rows, notes, _plot(rows), {"cells": list(cells)}, failures)


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from squall.conf.plots import BLUE, GREEN, GREY, ORANGE, clean_axes, new_figure

    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    ddp = [row for row in rows if row["rule"] == "DDP"]
    level = statistics.mean(row["test accuracy, %"] for row in ddp)
    axes.axhspan(level - _POINTS, level + _POINTS, color=GREY, alpha=0.13, linewidth=0)
    axes.axhline(level, color=GREY, linewidth=1.2, label=f"DDP, mean of all (band: {_POINTS} points)")
    single = [row for row in rows if row["rule"] == "any"]
    names = list(dict.fromkeys(row["rule"] for row in rows if row["rule"] not in ("DDP", "any")))
    for index, (name, colour, marker) in enumerate(zip(names, (ORANGE, BLUE, GREEN), ("o", "s", "^"), strict=False)):
        points = single + [row for row in rows if row["rule"] == name]
        places = [row["mean staleness"] for row in points]
        means = [row["test accuracy, %"] for row in points]
        axes.errorbar(
            places, means, yerr=[row["std"] or 0.0 for row in points], color=colour, marker=marker, markersize=5,
            capsize=2, linewidth=1.4, elinewidth=0.8, label=name.replace("_", " "),
        )  # fmt: skip
        if index == 0:
            for place, row in zip(places, points, strict=True):
                label = f"{row['workers']} worker{'s' if row['workers'] > 1 else ''}"
                axes.annotate(
                    label, (place, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 4),
                    textcoords="offset points", ha="center", fontsize=8, color=GREY,
                )  # fmt: skip
    axes.margins(x=0.1)  # for the labels of the first and the last
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="best")
    clean_axes(axes, "mean staleness of an update", "test accuracy, %")
    return figure


# ---------------------------------------------------------------------- one worker


class _Worker:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._data: Any = None

    def carry_out(self, order: Order) -> Cell:
        """Train a cell, and test on rank 0."""
        import torch
        from lightning.pytorch import Trainer
        from lightning.pytorch.strategies import DDPStrategy

        import squall
        from squall.models import FashionMNISTDataModule

        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if self._data is None:
            self._data = FashionMNISTDataModule(**order["data"])
            self._data.setup()
        number, rule = order["workers"], order["rule"]
        os.environ.update(
            LOCAL_RANK=str(self._rank), NODE_RANK="0", WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )  # fmt: skip
        module = _module(order)
        torch.manual_seed(1000 * (order["seed"] + 1) + self._rank)  # of random shifts and flips
        strategy: Any = DDPStrategy()
        if rule != _DDP:
            strategy = squall.DownpourStrategy(staleness_rule=rule, **order["downpour"])
        begin = time.perf_counter()
        Trainer(
            strategy=strategy, accelerator="cpu", devices=number, max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(module, self._loader(order))  # fmt: skip
        seconds = time.perf_counter() - begin
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self._rank:
            return {}
        cell = {"workers": number, "rule": rule, "seed": order["seed"], "seconds": seconds}
        if rule == _DDP:
            cell |= {"updates": order["num_samples"] // order["batch_size"], "samples": order["num_samples"]}
        else:
            report, staleness = strategy.report, strategy.staleness
            cell |= {"updates": report["version"], "samples": report["num_samples"]}
            late = staleness.total - min(strategy.warm_start_steps, staleness.total - 1)  # that could have been
            cell |= {"mean_staleness": staleness.mean * staleness.total / late, "max_staleness": staleness.maximum}
            cell["lost"] = report["num_lost"]
            cell["staleness"] = sorted(staleness.counts.items())
        return cell | {"accuracy": _accuracy(module, self._data.test_set)}

    def _loader(self, order: Order) -> Any:
        """Updates' images from one permutation after the other; DDP's ranks share each update's out."""
        import torch
        from torch.utils.data import DataLoader

        from squall.models.data_module import as_is

        generator = torch.Generator().manual_seed(order["seed"])
        num_samples, num_images = order["num_samples"], len(self._data.train_set)
        permutations = [torch.randperm(num_images, generator=generator) for _ in range(-(-num_samples // num_images))]
        updates = torch.cat(permutations)[:num_samples].view(-1, order["batch_size"])
        if order["rule"] == _DDP:
            updates = updates[:, self._rank :: order["workers"]]
        order_of_all = updates.flatten().tolist()  # a sampler without randomness of its own
        return DataLoader(self._data.train_set, updates.shape[1], sampler=order_of_all, collate_fn=as_is)


def _module(order: Order) -> Any:
    import torch

    from squall.models import AlexNet, ImageClassifier

    torch.manual_seed(order["seed"])
    return ImageClassifier(AlexNet(**order["net"]), **order["training"])


def _accuracy(module: Any, test_set: Any) -> float:
    import torch

    module.eval()
    right = 0
    with torch.inference_mode():
        for indices in torch.arange(len(test_set)).split(500):
            images, labels = test_set.__getitems__(indices)
            right += int((module(images).argmax(1) == labels).sum())
    return right / len(test_set)


if __name__ == "__main__":
    serve(_Worker(int(sys.argv[1])).carry_out)
