"""The command ``squall-plan``: predict what each Strategy makes of a model on machines, and recommend one.

``squall-plan simulate`` is the command ``squall.conf.simulate``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from squall.conf.main import FROM_DATA, UserError, report_errors
from squall.conf.writers import format_value, print_whole, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from squall.conf.planner.predictions import Prediction
    from squall.conf.planner.steps import Task


def task_of(model: DictConfig, images: Mapping[str, Any]) -> Task:
    """What a configuration of a model is to train.

    Args:
        model: An entry of the group ``model``.
        images: ``num_classes``, ``num_channels`` and ``image_size``, for what the model leaves null.

    """
    import torch

    from squall.conf.planner.steps import Task, momentum_sgd

    net = model.model.copy()
    for key, name in FROM_DATA.items():
        if key in net and net[key] is None:
            net[key] = images[name]
    with torch.device("meta"):
        made = hydra.utils.instantiate(net)
    optimizers: dict[str, Any] = {
        "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad
    }  # fmt: skip
    side = int(net.get("image_size") or images["image_size"])
    channels = int(net.get("in_channels") or images["num_channels"])
    example = torch.empty(1, channels, side, side, device="meta")
    return Task(made, example, optimizers.get(str(model.get("optimizer")), momentum_sgd))


def plan(cfg: DictConfig) -> tuple[dict[int, list[Prediction]], dict[str, str], Prediction, str]:
    """Predict every Strategy at every number of machines.

    Args:
        cfg: The composed tree, see ``conf/plan.yaml``.

    Returns:
        Predictions by number of machines, the fastest first; why others are left out; the recommended one at the
        largest number, and the reason.

    """
    from squall.conf.planner.alternatives import Batch
    from squall.conf.planner.clusters import HERE, cluster_of, sizes_of
    from squall.conf.planner.here import calibrate
    from squall.conf.planner.predictions import predict_all
    from squall.conf.planner.recommending import recommend
    from squall.conf.planner.steps import single

    task = task_of(cfg.model, cfg.images)
    entry: dict[str, Any] = OmegaConf.to_container(cfg.cluster, resolve=True)  # type: ignore[assignment]
    only = list(cfg.only) if cfg.only is not None else None
    downpour = dict(cfg.downpour)
    if entry["name"] == HERE:
        num_ranks = int(entry["devices_per_node"]) * sizes_of(entry["num_nodes"])[0]
        batch = Batch(int(cfg.batch_size or cfg.batch_per_device * num_ranks))
        path = None if cfg.calibration is None else Path(cfg.calibration)
        cluster = calibrate(task, batch, str(entry["link"]), num_ranks, downpour, path, only)
        sizes = [cluster.network.num_nodes]
    else:
        cluster, sizes = cluster_of(entry), sizes_of(entry["num_nodes"])
        if cfg.step_seconds is not None:
            device = cluster.device.scaled_to(single(task, int(cfg.batch_per_device)), float(cfg.step_seconds))
            cluster = replace(cluster, device=device)
    by_size: dict[int, list[Prediction]] = {}
    left_out: dict[str, str] = {}
    for size in sizes:
        resized = cluster.resized(size)
        batch = Batch(int(cfg.batch_size or cfg.batch_per_device * resized.num_ranks))
        by_size[size], left_out = predict_all(task, batch, resized, downpour, only)
    return by_size, left_out, *recommend(by_size[sizes[-1]], bool(cfg.asynchronous))


def show(cfg: DictConfig, stem: Path) -> None:
    """Plan, print the table and the recommendation, and write them with their pictures.

    Args:
        cfg: The composed tree.
        stem: Path without suffix.

    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from squall.conf.planner.predictions import layers_of, trace_of
    from squall.conf.planner.reports import draw_plan, draw_scaling, rows_of

    by_size, left_out, chosen, reason = plan(cfg)
    samples = float(cfg.samples)
    rows: list[dict[str, Any]] = []
    for size, predictions in by_size.items():
        own = rows_of(predictions, samples)
        rows += [{"machines": size, **row} for row in own] if len(by_size) > 1 else own
    command = " ".join(["squall", *chosen.alternative.overrides])
    notes = f"Recommended: {chosen.alternative.label}, {reason}. `{command}`"
    if left_out:
        notes += " Left out: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()) + "."
    layers = layers_of(trace_of(task_of(cfg.model, cfg.images), chosen.alternative, chosen.num_examples))
    write_results(stem, f"Plan for {cfg.cluster.name}", rows, notes=notes, extra={"layers": layers})
    pictures: dict[str, Figure] = {"": draw_plan(by_size[list(by_size)[-1]], chosen)}
    if len(by_size) > 1:
        pictures["_scaling"] = draw_scaling(by_size, samples, "machines")
    for suffix, figure in pictures.items():
        figure.savefig(stem.with_name(f"{stem.name}{suffix}.png"))
    shown = [name for name in rows[0] if len(by_size) == 1 or name not in ("MB sent a step", "ranks", "samples a euro")]
    table = Table(title=f"Plan for {cfg.cluster.name}", title_style="bold", box=SIMPLE_HEAD)
    for name in shown:
        longest = max(len(format_value(row.get(name))) for row in rows)
        table.add_column(name, justify="left" if name == "strategy" else "right", min_width=longest)
    seen: set[tuple[int, str]] = set()
    for row in rows:
        key = (row.get("machines", 0), row["strategy"].split()[0])
        if len(by_size) > 1 and key in seen:
            continue  # of a range, the best mesh of each strategy; the file has all
        seen.add(key)
        style = "bold" if row["strategy"] == chosen.alternative.label else None
        table.add_row(*(format_value(row.get(name)) for name in shown), style=style)
    print_whole(table, notes, f"[dim]{stem.resolve()}.md .json .png[/dim]")


@hydra.main(version_base="1.3", config_path=".", config_name="plan")
def _app(cfg: DictConfig) -> None:
    if cfg.get("cluster") is None or cfg.get("model") is None:
        raise UserError("Say what to plan: squall-plan model=NAME cluster=NAME")
    show(cfg, Path(HydraConfig.get().runtime.output_dir) / "plan")


def main() -> None:
    """Run the command; a message and exit code 1 when the user's input is at fault."""
    if sys.argv[1:2] == ["simulate"]:
        del sys.argv[1]
        import_module("squall.conf.simulate").main()
        return
    report_errors(_app)


if __name__ == "__main__":
    main()
