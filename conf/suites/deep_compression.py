"""Suite ``deep_compression``: accuracy against the size of the file, and against dense training of as many epochs.

Held equal in every cell of a net and seed are its first weights, the images and their order, the schedule and the
number of epochs. The first cell of a net is the dense one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.conf.bench import SuiteResult
from squall.conf.suites import trainings
from squall.conf.suites.cells import Cell
from squall.conf.suites.net_panels import draw_points, net_panels, set_ticks
from squall.conf.suites.trainings import DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOSS = 0.1  # points that are next to nothing
_QUANTITY = "test accuracy, %"


def measure(
    nets: Mapping[str, Mapping[str, Mapping[str, Any]]],
    seeds: Sequence[int],
    epochs: Mapping[str, int],
    batch_size: int,
    lr: Mapping[str, float],
    training: Mapping[str, Any],
    phases: Mapping[str, Any],
    data: Mapping[str, Any],
    claims: Mapping[str, Mapping[str, float]],
    num_processes: int,
    results: str,
) -> SuiteResult:
    """Train every cell, except those that an earlier, interrupted run has.

    Args:
        nets: By name of :mod:`squall.models`: settings by the name that the table has, with ``density`` and ``bits``.
        seeds: One training each.
        epochs: Of a training of each net, dense or not.
        batch_size: Images of a step.
        lr: Learning rate of each net.
        training: Further arguments of :class:`squall.models.ImageClassifier`.
        phases: Further arguments of :class:`squall.sparsity.DeepCompression`.
        data: Arguments of :class:`squall.models.FashionMNISTDataModule`.
        claims: By net, the ``rate`` that a setting has to reach which loses no more than so many ``points``.
        num_processes: Trainings at a time.
        results: Where a line of JSON a cell goes, as it is done, and where it is looked for.

    Returns:
        Rate and accuracy of each net and setting, mean and spread over the seeds.

    """
    trainings.check(nets, seeds, num_processes, epochs=epochs, lr=lr)
    orders: list[Cell] = []
    for own in trainings.of_nets(nets, seeds, epochs, lr, training, batch_size=batch_size, data=dict(data)):
        orders.append(own | {"algorithm": DENSE})
        for name, arguments in nets[own["net"]].items():
            orders.append(own | {"algorithm": name, "arguments": {**phases, **arguments}})
    cells = trainings.train_cells(orders, train, Path(results), num_processes)
    rows = summarize(cells)
    notes = (
        f"Fashion-MNIST, {len(seeds)} seeds; epochs {dict(epochs)}, all phases together, in batches of {batch_size},"
        f" lr {dict(lr)}, {dict(training)}, {dict(phases)}. Equal in every cell of a net and seed: first weights, order"
        " of images, schedule, epochs. The rate is 4 bytes a parameter over the bytes of the file on the disk; accuracy"
        f" is that on the 10,000 test images after the last step, of the file as it is read again. {_largest(rows)}"
    )
    return SuiteResult("Deep Compression", rows, notes, _plot(rows), {"cells": list(cells)}, _failures(rows, claims))


# ---------------------------------------------------------------------- the table and the picture


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each net and setting, compared with the dense net of the same seeds.

    Args:
        cells: One training each.

    """
    rows = []
    for net, name in dict.fromkeys((cell["net"], cell["algorithm"]) for cell in cells):
        mine = [cell for cell in cells if (cell["net"], cell["algorithm"]) == (net, name)]
        dense = {cell["seed"]: cell["accuracy"] for cell in cells if (cell["net"], cell["algorithm"]) == (net, DENSE)}
        accuracies = [100 * cell["accuracy"] for cell in mine]
        lost = [100 * (dense[cell["seed"]] - cell["accuracy"]) for cell in mine]
        rows.append(
            {
                "net": net,
                "setting": name,
                "rate": statistics.mean(cell["rate"] for cell in mine),
                "file bytes": statistics.mean(cell["file_bytes"] for cell in mine),
                _QUANTITY: statistics.mean(accuracies),
                "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "points lost": statistics.mean(lost),
                "seconds": statistics.mean(cell["seconds"] for cell in mine),
            }
        )
    return rows


def _largest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which rate of each net loses next to nothing."""
    nets = dict.fromkeys(row["net"] for row in rows)
    return " ".join(
        f"The largest rate of {net} that loses at most {_LOSS} points is {largest_rate(rows, net, _LOSS):.1f}."
        for net in nets
    )


def largest_rate(rows: Sequence[Mapping[str, Any]], net: str, points: float) -> float:
    """Find the largest rate that loses little.

    Args:
        rows: Of the table.
        net: One of its nets.
        points: What may be lost.

    Returns:
        The rate; the dense net's, 1, if none does.

    """
    return max((row["rate"] for row in rows if row["net"] == net and row["points lost"] <= points + 1e-6), default=1.0)


def _failures(rows: Sequence[Mapping[str, Any]], claims: Mapping[str, Mapping[str, float]]) -> list[str]:
    failures = []
    for net in dict.fromkeys(row["net"] for row in rows):
        claim = claims.get(net)
        if claim is not None and (rate := largest_rate(rows, net, claim["points"])) < claim["rate"]:
            failures.append(
                f"{net}: the largest rate that loses at most {claim['points']} points is {rate:.1f}, not"
                f" {claim['rate']}."
            )
    return failures


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from squall.conf.plots import BLUE

    figure, panels = net_panels(rows, "setting", _QUANTITY, "times smaller", 4.2)
    for axes, others in panels:
        points = sorted(others, key=lambda row: row["rate"])
        rates = [row["rate"] for row in points]
        draw_points(axes, rates, points, _QUANTITY, color=BLUE, marker="o", label="Deep Compression")
        for row in points:
            axes.annotate(
                row["setting"], (row["rate"], row[_QUANTITY]), xytext=(4, 5), textcoords="offset points", fontsize=7,
                color="#444444",
            )  # fmt: skip
        axes.margins(x=0.18, y=0.18)
        set_ticks(axes, [rate for rate in (10, 20, 30, 40, 60, 80, 100, 150, 200, 300) if _near(rate, points)], "{}x")
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _near(rate: float, points: Sequence[Mapping[str, Any]]) -> bool:
    rates = [row["rate"] for row in points]
    return bool(rates) and min(rates) / 1.3 <= rate <= 1.3 * max(rates)


# ---------------------------------------------------------------------- one training


def train(order: Cell) -> Cell:
    """Train a cell; and test the file that it leaves.

    Args:
        order: What :func:`measure` was told, and one net, seed and setting.

    """
    import torch

    import squall
    from squall import models

    torch.manual_seed(order["seed"])
    module = models.ImageClassifier(getattr(models, order["net"])(), **order["training"])
    num_bytes = sum(4 * tensor.numel() for tensor in module.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        strategy: Any = "auto"
        if order["algorithm"] != DENSE:
            strategy = squall.SparseStrategy(squall.sparsity.DeepCompression(dirpath=folder, **order["arguments"]))
        seconds = trainings.fit(module, strategy, order)
        file_bytes = num_bytes
        if order["algorithm"] != DENSE:
            path = Path(folder) / "compressed.safetensors"
            file_bytes = path.stat().st_size
            module.load_state_dict(squall.sparsity.load_compressed(path))
    return {
        "net": order["net"],
        "algorithm": order["algorithm"],
        "seed": order["seed"],
        "accuracy": trainings.accuracy(module, order),
        "file_bytes": file_bytes,
        "rate": num_bytes / file_bytes,
        "seconds": seconds,
    }
