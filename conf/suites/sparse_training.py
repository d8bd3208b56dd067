"""Suite ``sparse_training``: test error of few weights against all of them, by algorithm, density and net.

Held equal in every cell of a net and seed are its first weights, the images and their order, and the schedule. A cell
is a training of one thread in a process of its own kind; several run at a time.
"""

from __future__ import annotations

import statistics
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

_OURS, _FLOOR = "sparse_momentum", "static"
_QUANTITY = "test error, %"


def measure(
    nets: Sequence[str],
    densities: Sequence[float],
    algorithms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    epochs: Mapping[str, int],
    batch_size: int,
    lr: Mapping[str, float],
    training: Mapping[str, Any],
    drop_every: float,
    data: Mapping[str, Any],
    claims: Mapping[str, Mapping[str, float]],
    num_processes: int,
    results: str,
) -> SuiteResult:
    """Train every cell, except those that an earlier, interrupted run has.

    Args:
        nets: Names of :mod:`squall.models`.
        densities: Live weights over all.
        algorithms: By the name that the table has: ``kind``, a name of :mod:`squall.sparsity`, and its arguments.
        seeds: One training each.
        epochs: Of a training of each net.
        batch_size: Images of a step.
        lr: First learning rate of each net.
        training: Further arguments of :class:`squall.models.ImageClassifier`.
        drop_every: Part of the training after which the learning rate is a tenth, and again.
        data: Arguments of :class:`squall.models.FashionMNISTDataModule`.
        claims: By net and density, the largest factor by which the error of sparse momentum may exceed the dense one.
        num_processes: Trainings at a time.
        results: Where a line of JSON a cell goes, as it is done, and where it is looked for.

    Returns:
        Error, and its ratio to the dense one, of each net, density and algorithm: mean and spread over the seeds.

    """
    trainings.check(nets, seeds, num_processes, epochs=epochs, lr=lr)
    orders: list[Cell] = []
    common = {"batch_size": batch_size, "drop_every": drop_every, "data": dict(data)}
    for own in trainings.of_nets(nets, seeds, epochs, lr, training, **common):
        orders.append(own | {"algorithm": DENSE, "density": 1.0})
        for density in densities:
            for name, arguments in algorithms.items():
                orders.append(own | {"algorithm": name, "density": density, "arguments": dict(arguments)})
    cells = trainings.train_cells(orders, train, Path(results), num_processes)
    rows = summarize(cells)
    notes = (
        f"Fashion-MNIST, {len(seeds)} seeds; epochs {dict(epochs)} in batches of {batch_size}, lr {dict(lr)},"
        f" {dict(training)}, the rate a tenth after each {drop_every:.1%} of the training. Equal in every cell of a net"
        " and seed: first weights, order of images, schedule. Density is over all weights of two dimensions; the error"
        " is that on the 10,000 test images after the last step."
    )
    return SuiteResult(
        "Training with few weights", rows, notes, _plot(rows), {"cells": list(cells)}, _failures(rows, claims)
    )


# ---------------------------------------------------------------------- the table and the picture


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each net, density and algorithm, compared with the dense net.

    Args:
        cells: One training each.

    """
    rows = []
    keys = dict.fromkeys((cell["net"], cell["density"], cell["algorithm"]) for cell in cells)
    order = list(dict.fromkeys(cell["net"] for cell in cells))
    for net, density, algorithm in sorted(keys, key=lambda key: (order.index(key[0]), -key[1])):
        mine = [c for c in cells if (c["net"], c["density"], c["algorithm"]) == (net, density, algorithm)]
        errors = [100 * cell["error"] for cell in mine]
        dense = statistics.mean(100 * c["error"] for c in cells if (c["net"], c["algorithm"]) == (net, DENSE))
        rows.append(
            {
                "net": net,
                "density": density,
                "algorithm": algorithm,
                _QUANTITY: statistics.mean(errors),
                "std": statistics.stdev(errors) if len(errors) > 1 else None,
                "x dense": statistics.mean(errors) / dense,
                "live weights": mine[0]["num_live"],
                "seconds": statistics.mean(cell["seconds"] for cell in mine),
            }
        )
    return rows


def _failures(rows: Sequence[Mapping[str, Any]], claims: Mapping[str, Mapping[str, float]]) -> list[str]:
    failures = []
    found = {(row["net"], row["density"], row["algorithm"]): row for row in rows}
    for net, by_density in claims.items():
        for density, factor in by_density.items():
            row = found.get((net, float(density), _OURS))
            if row is not None and row["x dense"] > factor:
                failures.append(
                    f"{net} at {float(density):.0%}: {row['x dense']:.2f} times the dense error, not {factor}."
                )
    for (net, density, algorithm), row in found.items():
        floor = found.get((net, density, _FLOOR))
        if algorithm == _OURS and floor is not None and row[_QUANTITY] >= floor[_QUANTITY]:
            failures.append(f"{net} at {density:.0%}: sparse momentum is no better than a mask that stays.")
    return failures


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from squall.conf.plots import BLUE, GREEN, GREY, ORANGE

    figure, panels = net_panels(rows, "algorithm", _QUANTITY, "weights, %", 3.6)
    for axes, others in panels:
        names = dict.fromkeys(row["algorithm"] for row in others)
        styles = zip(names, (ORANGE, BLUE, GREEN, GREY), ("o", "s", "^", "x"), strict=False)
        for name, colour, marker in styles:
            points = [row for row in others if row["algorithm"] == name]
            places = [100 * row["density"] for row in points]
            draw_points(axes, places, points, _QUANTITY, color=colour, marker=marker, label=name.replace("_", " "))
        set_ticks(axes, sorted({100 * row["density"] for row in others}), "{:g}")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------- one training


def train(order: Cell) -> Cell:
    """Train a cell, and test it.

    Args:
        order: What :func:`measure` was told, and one net, seed, density and algorithm.

    """
    import torch

    import squall
    from squall import models

    num_images = len(trainings.load_images(order["data"])[0])
    num_steps = order["epochs"] * -(-num_images // order["batch_size"])
    torch.manual_seed(order["seed"])
    module = models.ImageClassifier(
        getattr(models, order["net"])(), schedule="steps", **order["training"],
        steps_per_drop=max(1, round(order["drop_every"] * num_steps)),
    )  # fmt: skip
    strategy: Any = "auto"
    if order["algorithm"] != DENSE:
        arguments = dict(order["arguments"])
        kind = getattr(squall.sparsity, arguments.pop("kind"))
        strategy = squall.SparseStrategy(kind(density=order["density"], seed=order["seed"], **arguments))
    seconds = trainings.fit(module, strategy, order)
    weights = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    return {
        "net": order["net"],
        "density": order["density"],
        "algorithm": order["algorithm"],
        "seed": order["seed"],
        "error": 1.0 - trainings.accuracy(module, order),
        "num_live": sum(int(parameter.count_nonzero()) for parameter in weights),
        "seconds": seconds,
    }
