"""The two pictures of a run: its learning curve, and the first layer's kernels, one block per column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from squall import ColumnParallelStrategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2f6f9f", "#d9782d", "#4b8f5c", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, "#8d5a97", "#b5483f", "#6b7f2a")


def new_figure(width: float, height: float) -> Figure:
    """Make a figure that needs no display and leaves pyplot's global state alone.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        An empty matplotlib figure.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def clean_axes(axes: Axes, xlabel: str = "", ylabel: str = "", title: str = "") -> None:
    """Take off what an axis doesn't need, and label it.

    Args:
        axes: Changed in place.
        xlabel: Under the x axis.
        ylabel: Beside the y axis.
        title: Above, at the left.

    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors="#444444", labelsize=8)
    axes.set_xlabel(xlabel, fontsize=9, color="#444444")
    axes.set_ylabel(ylabel, fontsize=9, color="#444444")
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#222222")


def smooth(values: Sequence[float], width: int) -> NDArray[np.float64]:
    """Average each value with those up to `width` before it.

    Args:
        values: A series.
        width: Number of values to average, 1 or more.

    Returns:
        As many values.

    Example:
        >>> smooth([0.0, 2.0, 4.0], 2).tolist()
        [0.0, 1.0, 3.0]

    """
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=np.float64)]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    means: NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return means


class LearningCurve(Callback):
    """Draw ``learning_curve.png``: loss by epoch, and accuracy where the model logs it.

    Args:
        dirpath: Where the picture goes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LearningCurve("outputs")], logger=False)

    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)
        self.train_loss: list[tuple[float, float]] = []
        self.validation: dict[str, list[tuple[float, float]]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of the batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            part = (batch_idx + 1) / max(1, int(min(trainer.num_training_batches, 10**9)))
            self.train_loss.append((trainer.current_epoch + part, float(loss.detach())))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note every validation metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val"):
                self.validation.setdefault(name, []).append((trainer.current_epoch + 1, float(value)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        if not trainer.is_global_zero or not self.train_loss:
            return
        self.dirpath.mkdir(parents=True, exist_ok=True)
        self.draw().savefig(self.dirpath / "learning_curve.png")

    def draw(self) -> Figure:
        """Draw what has been noted.

        Returns:
            The figure, one panel for losses and one for accuracies if there are any.

        """
        losses = {name: points for name, points in self.validation.items() if "loss" in name}
        accuracies = {name: points for name, points in self.validation.items() if "acc" in name}
        figure = new_figure(4.4 * (2 if accuracies else 1), 3.2)
        panels = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
        epochs, values = zip(*self.train_loss, strict=True)
        width = max(1, len(values) // 50)
        axes = panels[0]
        axes.plot(epochs, values, color=BLUE, alpha=0.18, linewidth=0.8)
        axes.plot(epochs, smooth(values, width), color=BLUE, linewidth=1.6, label="training")
        for colour, (name, points) in zip((ORANGE, GREEN), losses.items(), strict=False):
            label = "validation" if len(losses) == 1 else name
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=label)
        positive = [value for value in values if value > 0]
        if positive and min(positive) < max(values) / 20:
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
        clean_axes(axes, "epoch", "", "Loss")
        for axes in panels[1:]:
            for colour, (name, points) in zip(COLOURS[1:], accuracies.items(), strict=False):
                x, y = zip(*points, strict=True)
                y = tuple(100 * value for value in y)
                axes.plot(x, y, color=colour, marker="o", markersize=3.5, label=name)
                axes.annotate(
                    f"{y[-1]:.2f} %",
                    (x[-1], y[-1]),
                    xytext=(0, -12),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
            if len(accuracies) > 1:
                axes.legend(frameon=False, fontsize=8)
            clean_axes(axes, "epoch", "", "Validation accuracy, %")
        for axes in panels:
            axes.set_xlim(0, None)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        return figure


class FirstLayerKernels(Callback):
    """Draw ``conv1_kernels.png``, as figure 3 of Krizhevsky et al., 2012: the kernels of each column in a block.

    Args:
        dirpath: Where the picture goes.
        num_blocks: Number of columns; None takes the model's own ``num_columns``, or 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FirstLayerKernels("outputs")], logger=False)

    """

    def __init__(self, dirpath: str | Path, num_blocks: int | None = None) -> None:
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks must be 1 or more, got {num_blocks}.")
        self.dirpath = Path(dirpath)
        self.num_blocks = num_blocks

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the first convolution's weight from all ranks, and draw it."""
        name = first_convolution(pl_module)
        if name is None:
            return
        # What a checkpoint would hold: whole tensors, whatever part of them this rank has.
        weight = trainer.strategy.lightning_module_state_dict().get(f"{name}.weight")
        if not trainer.is_global_zero or weight is None:
            return
        strategy = trainer.strategy
        num_columns = strategy.num_columns if isinstance(strategy, ColumnParallelStrategy) else 1
        blocks = self.num_blocks or _num_columns(pl_module) or num_columns
        self.dirpath.mkdir(parents=True, exist_ok=True)
        draw_kernels(weight.detach().float().cpu().numpy(), int(blocks)).savefig(self.dirpath / "conv1_kernels.png")


def first_convolution(module: torch.nn.Module) -> str | None:
    """Find the first convolution over images.

    Args:
        module: Any module.

    Returns:
        Its name, or None if there is none.

    """
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Conv2d):
            return str(name)
    return None


def draw_kernels(weight: NDArray[np.floating[Any]], num_blocks: int) -> Figure:
    """Draw kernels as small pictures, each stretched to its own range of values.

    Args:
        weight: ``(kernels, channels, height, width)``; three channels are shown in colour, others as their mean in
            grey.
        num_blocks: Kernels are cut into so many blocks, as :func:`numpy.array_split` cuts.

    Returns:
        The figure, the blocks under each other.

    """
    blocks = [block for block in np.array_split(weight, num_blocks) if len(block)]
    mosaics = [_mosaic(block) for block in blocks]
    height, width = sum(m.shape[0] for m in mosaics), max(m.shape[1] for m in mosaics)
    inches = min(7.0, max(3.6, 0.62 * _per_row(len(blocks[0]))))  # few kernels needn't fill the page
    figure = new_figure(inches, inches * height / width + 0.42 * len(blocks))
    panels = figure.subplots(len(blocks), 1, height_ratios=[m.shape[0] for m in mosaics], squeeze=False)[:, 0]
    first = 0
    for number, (axes, block, mosaic) in enumerate(zip(panels, blocks, mosaics, strict=True), start=1):
        axes.imshow(mosaic, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        size = f"{weight.shape[2]} x {weight.shape[3]} x {weight.shape[1]}"
        name = f"Column {number}: " if num_blocks > 1 else ""
        axes.set_title(
            f"{name}kernels {first + 1} to {first + len(block)} of {len(weight)}, {size}",
            loc="left",
            fontsize=9,
            color="#222222",
        )
        axes.axis("off")
        first += len(block)
    return figure


def _mosaic(kernels: NDArray[np.floating[Any]], gap_share: float = 0.18) -> NDArray[np.floating[Any]]:
    """Set kernels side by side with white gaps: ``(rows x height, columns x width, 3)`` in 0..1."""
    if kernels.shape[1] != 3:
        kernels = np.repeat(kernels.mean(axis=1, keepdims=True), 3, axis=1)
    low = kernels.min(axis=(1, 2, 3), keepdims=True)
    high = kernels.max(axis=(1, 2, 3), keepdims=True)
    pictures = ((kernels - low) / np.maximum(high - low, 1e-12)).transpose(0, 2, 3, 1)
    # Every weight is drawn as a square of several pixels, so that the gap can be less than a weight wide.
    scale = max(1, round(24 / kernels.shape[2]))
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pictures.shape
    per_row = _per_row(count)
    rows = math.ceil(count / per_row)
    gap = max(1, round(gap_share * height))
    canvas = np.ones((rows * (height + gap) - gap, per_row * (width + gap) - gap, 3))
    for index, picture in enumerate(pictures):
        y, x = divmod(index, per_row)
        y, x = y * (height + gap), x * (width + gap)
        canvas[y : y + height, x : x + width] = picture
    return canvas


def _per_row(count: int) -> int:
    """As in the paper, where 48 kernels make 3 rows of 16; without a last row half empty where a divisor is near."""
    ideal = math.sqrt(count * 16 / 3)
    divisors = [d for d in range(1, count + 1) if count % d == 0 and 0.6 * ideal <= d <= 1.6 * ideal]
    return min(divisors, key=lambda d: abs(d - ideal)) if divisors else min(count, round(ideal))


def _num_columns(module: torch.nn.Module) -> int | None:
    for child in module.modules():
        value = getattr(child, "num_columns", None)
        if isinstance(value, int):
            return value
    return None
