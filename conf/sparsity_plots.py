"""Pictures of sparse runs: density of each layer over time; what a compressed file came to; and shared weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from squall.conf.plots import BLUE, COLOURS, GREY, ORANGE, clean_axes, new_figure
from squall.sparse import SparseStrategy
from squall.sparsity import CompressionReport, densities
from squall.sparsity.compressing import CompressingTraining
from squall.sparsity.layers import layer_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFIX = "density/"
_MANY = 12  # layers, from which on a legend is too long


class SparsityPictures(Callback):
    """Draw ``density.png`` of a sparse run; and of Deep Compression ``compression.png`` and ``shared_weights.png``.

    Runs under another Strategy have no such pictures. TensorBoard gets them too, and a histogram of each layer's shared
    weights.

    Args:
        dirpath: Where the pictures go.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SparsityPictures("outputs")], logger=False)

    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)
        self.density: dict[str, list[tuple[int, float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Remember densities."""
        return {"density": {name: [list(point) for point in points] for name, points in self.density.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.density = {
            name: [(point[0], point[1]) for point in points] for name, points in state_dict["density"].items()
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how dense each layer is."""
        if isinstance(trainer.strategy, SparseStrategy):
            for name, value in densities(trainer.strategy.masks).items():
                points = self.density.setdefault(name.removeprefix(_PREFIX), [])
                points.append((trainer.current_epoch + 1, value))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the pictures."""
        strategy = trainer.strategy
        if not isinstance(strategy, SparseStrategy) or not trainer.is_global_zero or not self.density:
            return
        figures = {"density": draw_densities(self.density)}
        if strategy.compression_report is not None:
            figures["compression"] = draw_report(strategy.compression_report)
        training = strategy.training
        if isinstance(training, CompressingTraining) and training.clusters:
            figures["shared_weights"] = draw_shared_weights(training)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(self.dirpath / f"{name}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"sparsity/{name}", figure, trainer.global_step)
                if isinstance(training, CompressingTraining):
                    for name, clusters in training.clusters.items():
                        weights = training.parameters[name].detach()[clusters.mask].float().cpu()
                        logger.experiment.add_histogram(f"shared_weights/{name}", weights, trainer.global_step)


def draw_densities(density: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw the density of each layer over time.

    Args:
        density: By layer, epochs and densities; ``total`` is all layers together.

    Returns:
        The figure.

    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    layers = [name for name in density if name != "total"]
    for index, name in enumerate(layers):
        x, y = zip(*density[name], strict=True)
        colour = COLOURS[index % len(COLOURS)] if len(layers) <= _MANY else BLUE
        line = "-" if index < len(COLOURS) or len(layers) > _MANY else "--"
        label = _short(name, layers) if len(layers) <= _MANY else "layers" if not index else None
        values = [100 * value for value in y]
        axes.plot(x, values, line, color=colour, linewidth=1.3, drawstyle="steps-mid", alpha=0.9, label=label)
    x, y = zip(*density["total"], strict=True)
    axes.plot(x, [100 * v for v in y], color="#222222", linewidth=2.0, drawstyle="steps-mid", label="total")
    axes.set_yscale("log")
    low = 100 * min(value for points in density.values() for _, value in points)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= low / 1.6]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    clean_axes(axes, "epoch", "live weights, %", "Density")
    return figure


def draw_report(report: CompressionReport) -> Figure:
    """Draw what each layer came to: bits of a weight before and after coding, and its size.

    Args:
        report: Of the compressed file.

    Returns:
        The figure, a row a layer.

    """
    rows = [row for row in report.rows()[:-1] if row["idx"] or row["w bits"] < 32]
    layers = [row["layer"] for row in rows]
    names = [_short(name, layers) for name in layers]
    figure = new_figure(7.2, 1.2 + 0.42 * max(len(rows), 1))
    bits, sizes = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    for shift, weight, index, alpha in ((-0.2, "w bits", "idx", 0.4), (0.2, "w bits H", "idx H", 1.0)):
        y = [place + shift for place in places]
        weights = [row[weight] for row in rows]
        said = " before coding" if alpha < 1 else " coded"
        bits.barh(y, weights, 0.36, color=BLUE, alpha=alpha, label=f"weight{said}")
        bits.barh(y, [row[index] for row in rows], 0.36, weights, color=ORANGE, alpha=alpha, label=f"index{said}")
    bits.set_yticks(list(places), names)
    bits.invert_yaxis()
    clean_axes(bits, "bits a live weight", "", "Bits")
    before = [row["P+Q %"] for row in rows]
    after = [row["P+Q+H %"] for row in rows]
    sizes.barh([place - 0.2 for place in places], before, 0.36, color=GREY, alpha=0.5, label="pruned and shared")
    sizes.barh([place + 0.2 for place in places], after, 0.36, color=GREY, label="and coded")
    for place, row in zip(places, rows, strict=True):
        end = max(row["P+Q %"], row["P+Q+H %"])
        sizes.annotate(
            f"{row['dens. %']:.3g} % live, {row['rate']:.0f} x", (end, place), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=7, color="#444444",
        )  # fmt: skip
    sizes.set_xlim(0, 1.6 * max([*before, *after, 1e-9]))
    clean_axes(sizes, "% of fp32", "", f"Size: {report.rate:.1f} x smaller")
    for axes in (bits, sizes):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(
            frameon=False,
            fontsize=7,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.52 / max(len(rows), 1) - 0.1),
        ) if handles else None
    return figure


def draw_shared_weights(training: CompressingTraining) -> Figure:
    """Draw how weights lay when they began to share values, and where these values are.

    Args:
        training: Whose weights share values.

    Returns:
        The figure, a panel a layer.

    """
    names = list(training.clusters)
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = new_figure(3.4 * num_columns, 2.4 * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    layers = [layer_name(name) for name in names]
    for axes, name, layer in zip(panels, names, layers, strict=False):
        clusters, first = training.clusters[name], training.first_values[name]
        width = (first.high - first.low) / len(first.counts) or 1.0
        middles = [first.low + (index + 0.5) * width for index in range(len(first.counts))]
        axes.fill_between(
            middles, first.counts.tolist(), step="mid", color=BLUE, alpha=0.3, linewidth=0, label="weights"
        )
        top = float(first.counts.max())
        values = clusters.means(training.parameters[name].detach()).double().cpu().tolist()
        axes.vlines(
            first.centroids.double().tolist(), -0.1 * top, -0.02 * top, color=BLUE, linewidth=0.8, label="first values"
        )
        axes.vlines(values, -0.2 * top, -0.12 * top, color=ORANGE, linewidth=0.8, label="trained values")
        axes.set_ylim(-0.24 * top, None)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.locator_params(axis="both", nbins=5)
        clean_axes(axes, "", "", f"{_short(layer, layers)}: {len(clusters)} values")
    for axes in panels[len(names) :]:
        axes.axis("off")
    panels[0].legend(frameon=False, fontsize=6.5, loc="upper right")
    return figure


def _short(name: str, names: Sequence[str]) -> str:
    """A name without what all of them begin with."""
    parts = [other.split(".") for other in names]
    common = 0
    while all(len(other) > common + 1 and other[common] == parts[0][common] for other in parts):
        common += 1
    return ".".join(name.split(".")[common:])
