"""Suite ``sandblaster``: whom a batch waits for, what moves, and accuracy against passes over the data and time.

Run as a program, this is one of the ranks.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from squall.conf.bench import SuiteResult
from squall.conf.suites.programs import Order, Programs, free_port, programs, serve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 1.35  # times the ideal of the aggregate speed
_NAMES = {"sandblaster": "Sandblaster L-BFGS", "downpour": "Downpour, Adagrad", "ddp": "DDP, SGD"}
_MODULE = "squall.conf.suites.sandblaster"


def measure(slow: Mapping[str, Any], learning: Mapping[str, Any]) -> SuiteResult:
    """Time batches with one slow rank, and train a net in three ways.

    Args:
        slow: ``num_ranks``, of which the last takes ``slowdown`` times ``portion_seconds`` a portion, ``num_portions``
            of a batch, ``num_evaluations`` a turn, ``num_rounds`` turns.
        learning: ``num_ranks``; ``num_passes``, ``batch_size`` and arguments of the module (``training``) of each way;
            arguments of the Strategies, and ``data`` of :class:`squall.models.FashionMNISTDataModule`.

    Returns:
        Seconds a batch against the ideal, and each way's accuracy; the picture is the paper's figure 4.

    """
    with Progress() as progress:
        batches = _slow_rank(slow, progress)
        curves = _learning(learning, progress)
    ideal = batches["ideal"]
    rows, failures = [], []
    for name in ("backup portions", "no backup portions"):
        ratio = statistics.median(batches[name]) / ideal
        rows.append({"what": f"a batch, one of {slow['num_ranks']} ranks {slow['slowdown']:g} x slower, {name}",
                     "seconds": statistics.median(batches[name]), "x the ideal": ratio})  # fmt: skip
        if name == "backup portions" and ratio > _MOST:
            failures.append(f"A batch took {ratio:.2f} times the ideal, not {_MOST}.")
    for name, curve in curves.items():
        rows.append({
            "what": f"{_NAMES[name]}, LeNet-300-100", "seconds": curve["points"][-1]["seconds"],
            "passes over the data": curve["points"][-1]["passes"],
            "test accuracy, %": 100 * curve["points"][-1]["accuracy"], **curve["moved"],
        })  # fmt: skip
    notes = (
        f"A slowed batch has {slow['num_portions']} portions, each of which a rank sleeps {slow['portion_seconds']} s"
        " over, or the slow one longer. The ideal is portions over the sum of what the ranks do of them in a second,"
        f" alone, in the same run: {ideal:.3f} s; medians of {slow['num_rounds']} rounds of {slow['num_evaluations']}"
        f" batches. The nets learn on {learning['num_ranks']} ranks of one thread, with {dict(learning['training'])}"
        f" and batches of {dict(learning['batch_size'])}; seconds are without those of testing. Bytes are a rank's, in"
        " units of the weights' own, an evaluation or pass; and what is told of an iteration besides, in all."
    )
    return SuiteResult(
        "Sandblaster", rows, notes, _plot(batches, curves), {"slow": batches, "curves": curves}, failures
    )


# ---------------------------------------------------------------------- one slow rank


def _slow_rank(slow: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Seconds of each batch."""
    num_ranks, seconds = slow["num_ranks"], slow["portion_seconds"]
    paces = [seconds] * (num_ranks - 1) + [seconds * slow["slowdown"]]
    common = {"do": "slow", "num_portions": slow["num_portions"], "num_evaluations": slow["num_evaluations"]}
    turns: dict[str, list[float]] = {"backup portions": [], "no backup portions": []}
    task = progress.add_task("a slow rank", total=slow["num_rounds"] * len(turns) + 2)
    with programs(_MODULE, num_ranks) as ranks:
        alone = []
        for pace in sorted(set(paces)):
            ticks = _ask(ranks, 1, {**common, "paces": [pace], "backup": True, "num_evaluations": 2})[0]
            alone.append((pace, _median_gap(ticks) / slow["num_portions"]))
            progress.advance(task)
        speed = dict(alone)
        for _ in range(slow["num_rounds"]):
            for name, found in turns.items():
                ticks = _ask(ranks, num_ranks, {**common, "paces": paces, "backup": name.startswith("backup")})[0]
                found.append(_median_gap(ticks))
                progress.advance(task)
    return {**turns, "ideal": slow["num_portions"] / sum(1 / speed[pace] for pace in paces)}


def _median_gap(ticks: Sequence[float]) -> float:
    return statistics.median(b - a for a, b in pairwise(ticks[1:]))  # the first is slow


def _ask(ranks: Programs, num_ranks: int, order: Order) -> dict[int, Any]:
    port = free_port()
    return ranks.ask({rank: {**order, "num_ranks": num_ranks, "port": port} for rank in range(num_ranks)})


# ---------------------------------------------------------------------- learning


def _learning(learning: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """What each way comes to."""
    curves = {}
    task = progress.add_task("learning", total=len(_NAMES))
    with programs(_MODULE, learning["num_ranks"]) as ranks:
        for name in _NAMES:
            order = {
                "do": "learn", "strategy": name, "options": learning.get(name, {}), "data": learning["data"],
                "training": learning["training"][name], "num_passes": learning["num_passes"][name],
                "batch_size": learning["batch_size"][name],
            }  # fmt: skip
            curves[name] = _ask(ranks, learning["num_ranks"], order)[0]
            progress.advance(task)
    return curves


def _plot(batches: Mapping[str, Any], curves: Mapping[str, Any]) -> Figure:
    from squall.conf.plots import BLUE, GREEN, GREY, ORANGE, clean_axes, new_figure

    colours = {"sandblaster": ORANGE, "downpour": BLUE, "ddp": GREEN}
    figure = new_figure(10.0, 3.4)
    by_pass, by_time, bars = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    for axes, key, label in ((by_pass, "passes", "passes over the data"), (by_time, "seconds", "seconds")):
        for name, curve in curves.items():
            points = curve["points"]
            axes.plot(
                [point[key] for point in points], [100 * point["accuracy"] for point in points], color=colours[name],
                linewidth=1.4, label=_NAMES[name],
            )  # fmt: skip
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.set_ylim(bottom=70)
        clean_axes(axes, label, "test accuracy, %", "Accuracy" if key == "passes" else "")
    by_pass.legend(frameon=False, fontsize=8, loc="lower right")
    names = ["ideal", "backup portions", "no backup portions"]
    heights = [batches["ideal"], *(statistics.median(batches[name]) for name in names[1:])]
    bars.bar(["ideal", "with\nbackups", "without"], heights, 0.6, color=[GREY, ORANGE, BLUE])
    for place, height in enumerate(heights):
        bars.annotate(f"{height:.2f}", (place, height / 2), ha="center", va="center", fontsize=8, color="white")
    clean_axes(bars, "", "seconds a batch", "One rank of four is slow")
    return figure


# ---------------------------------------------------------------------- one rank


class _Rank:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def carry_out(self, order: Order) -> Any:
        """Fit once."""
        import torch

        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(key, None)
        os.environ.update(
            LOCAL_RANK=str(self._rank), NODE_RANK="0", WORLD_SIZE=str(order["num_ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )  # fmt: skip
        return self._sleep(order) if order["do"] == "slow" else self._learn(order)

    def _fit(self, module: Any, loader: Any, strategy: Any, num_ranks: int, num_epochs: int, callback: Any) -> Any:
        from lightning.pytorch import Trainer

        trainer = Trainer(
            strategy=strategy, accelerator="cpu", devices=num_ranks, max_epochs=num_epochs, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(module, loader)
        return trainer

    def _sleep(self, order: Order) -> list[float]:
        """Say when each batch began."""
        import torch
        from lightning.pytorch import Callback, LightningModule
        from torch import Tensor
        from torch.utils.data import DataLoader, TensorDataset

        import squall

        pace = order["paces"][self._rank]

        class Sleeper(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.net = torch.nn.Linear(20, 10)

            def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
                time.sleep(pace)
                return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        class Ticks(Callback):
            def __init__(self) -> None:
                self.found: list[float] = []
                self._serial = -1

            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                if trainer.strategy.replica.serial != self._serial:
                    self._serial = trainer.strategy.replica.serial
                    self.found.append(time.perf_counter())

        num_portions = order["num_portions"]
        data = TensorDataset(torch.randn(num_portions, 20), torch.randint(10, (num_portions,)))
        ticks = Ticks()
        strategy = squall.SandblasterStrategy(backup_portions=order["backup"], tolerance_change=0.0)
        self._fit(Sleeper(), DataLoader(data), strategy, order["num_ranks"], order["num_evaluations"] + 2, ticks)
        return ticks.found

    def _learn(self, order: Order) -> dict[str, Any]:
        """Say how well the net did after each pass, and what was moved."""
        import torch
        from lightning.pytorch import Callback
        from torch.utils.data import DataLoader, TensorDataset

        import squall
        from squall import models
        from squall.conf.suites.trainings import accuracy, load_images

        images, labels, _, _ = load_images(order["data"])
        torch.manual_seed(0)
        module = models.ImageClassifier(models.LeNet300(), **{"schedule": "none", **order["training"]})
        points: list[dict[str, float]] = []

        class Curve(Callback):
            def on_train_start(self, *args: Any) -> None:
                self._begin = time.perf_counter()

            def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_rank:
                    return
                elapsed = time.perf_counter() - self._begin
                points.append({
                    "passes": trainer.current_epoch + 1, "seconds": elapsed, "accuracy": accuracy(module, order),
                })  # fmt: skip
                module.train()
                self._begin += time.perf_counter() - self._begin - elapsed

        name = order["strategy"]
        strategy: Any = {
            "sandblaster": lambda: squall.SandblasterStrategy(**order["options"]),
            "downpour": lambda: squall.DownpourStrategy(**order["options"]),
            "ddp": lambda: "ddp",
        }[name]()
        loader = DataLoader(TensorDataset(images, labels), batch_size=order["batch_size"], shuffle=True)
        trainer = self._fit(module, loader, strategy, order["num_ranks"], order["num_passes"], Curve())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        size = sum(parameter.nbytes for parameter in module.parameters())
        known = {key: float(value) for key, value in trainer.callback_metrics.items()}
        moved = {}
        if name == "sandblaster":
            moved = {
                "gradients pushed": known["bytes/pushed"] / size,
                "weights fetched": known["bytes/fetched"] / size,
                "bytes besides": known["bytes/scalars"],
            }
        return {"points": points, "moved": moved}


if __name__ == "__main__":
    serve(_Rank(int(sys.argv[1])).carry_out)
