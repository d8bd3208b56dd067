"""At the end of a sweep: one table and one picture of all its jobs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from squall.conf.writers import format_value, print_whole, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The keys of a job's summary that are compared, with the heading of their column.
COLUMNS = {
    "test_accuracy": "test accuracy",
    "images_per_second": "images/s",
    "parameters_per_rank": "weights per rank",
    "bytes_per_image": "bytes per image",
    "fit_seconds": "seconds",
}


class Comparison(Callback):
    """Hydra callback: print a table of a sweep's jobs; write ``comparison.md``, ``.json`` and ``.png`` beside them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect what the jobs wrote.

        Args:
            config: The sweep's configuration.
            **kwargs: Not used.

        """
        folder = Path(str(config.hydra.sweep.dir))
        rows = collect(folder)
        if not rows:
            return
        write_results(folder / "comparison", "Comparison of the jobs of this sweep", rows)
        try:
            draw(rows).savefig(folder / "comparison.png")
        except ImportError:
            warnings.warn("No comparison.png without matplotlib: pip install matplotlib", stacklevel=1)
        print_table(rows, folder)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Read the summaries of a sweep's jobs.

    Args:
        folder: The sweep's folder; every job has one in it.

    Returns:
        A row a job that left a summary: what it was told that others weren't, an override a column; then its figures.

    """
    rows = []
    for path in sorted(folder.glob("*/summary.json"), key=lambda p: (len(p.parent.name), p.parent.name)):
        summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
        summary["parameters_per_rank"] = max(summary.get("parameters_per_rank") or [0]) or None
        crossings = summary.get("crossings")
        summary["bytes_per_image"] = sum(c["bytes_per_image"] for c in crossings) if crossings is not None else None
        overrides = path.parent / ".hydra" / "overrides.yaml"
        words = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
        told = dict(str(word).partition("=")[::2] for word in words or [])
        rows.append((path.parent.name, told, summary))
    present = [key for key in COLUMNS if any(summary.get(key) is not None for *_, summary in rows)]
    # What all jobs were told alike doesn't tell them apart.
    keys = dict.fromkeys(key for _, told, _ in rows for key in told)
    differing = [key for key in keys if len({told.get(key) for _, told, _ in rows}) > 1]
    return [
        {
            "job": job,
            **{key: told.get(key, "-") for key in differing},
            **{COLUMNS[key]: summary.get(key) for key in present},
        }
        for job, told, summary in rows
    ]


def print_table(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Print the comparison; the best accuracy and the best speed in bold.

    Args:
        rows: As of :func:`collect`.
        folder: Named below the table.

    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Comparison of the jobs of this sweep", title_style="bold", box=SIMPLE_HEAD)
    shown = [key for key in rows[0] if key != COLUMNS["fit_seconds"]]
    best = {key: max((row.get(key) or 0 for row in rows), default=0) for key in ("test accuracy", "images/s")}
    for key in shown:
        words = key not in COLUMNS.values()
        # A heading may break between words; a cell may not.
        longest = max(len(word) for word in [*key.split(), *(_text(key, row.get(key)) for row in rows)])
        table.add_column(key, justify="left" if words else "right", min_width=longest)
    for row in rows:
        table.add_row(
            *(
                f"[bold]{_text(k, v)}[/bold]" if v and v == best.get(k) else _text(k, v)
                for k, v in row.items()
                if k in shown
            )
        )
    print_whole(table, f"[dim]{folder.resolve()}[/dim]")


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the comparison: a panel a column of the table, a bar a job.

    Args:
        rows: As of :func:`collect`.

    Returns:
        The figure.

    """
    from squall.conf.plots import COLOURS, clean_axes, new_figure

    keys = [key for key in rows[0] if key in COLUMNS.values() and key != COLUMNS["fit_seconds"]]
    words = [key for key in rows[0] if key not in COLUMNS.values() and key != "job"]
    labels = [", ".join(str(row[key]) for key in words) or f"job {row['job']}" for row in rows]
    longest = max(map(len, labels))
    figure = new_figure(0.07 * longest + 2.6 * max(1, len(keys)), 0.36 * len(rows) + 0.8)
    panels = figure.subplots(1, max(1, len(keys)), sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for axes, key in zip(panels, keys, strict=False):
        values = [float(row[key] or 0) for row in rows]
        bars = axes.barh(places, values, height=0.62, color=[COLOURS[i % len(COLOURS)] for i in places])
        axes.bar_label(bars, [_text(key, row[key]) for row in rows], padding=3, fontsize=8, color="#222222")
        clean_axes(axes, title=key)
        axes.set_xlim(0, (max(values) or 1) * 1.38)
        axes.set_xticks([])
        axes.tick_params(left=False)
        axes.spines["bottom"].set_visible(False)
    panels[0].set_yticks(list(places), labels)
    panels[0].invert_yaxis()
    return figure


def _text(key: str, value: Any) -> str:
    if value is not None and "accuracy" in key:
        return f"{100 * value:.2f} %"
    return format_value(value)
