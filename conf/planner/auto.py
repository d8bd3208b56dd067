"""``squall strategy=auto``: let the planner choose for the model, the data and the ranks that there are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from .predictions import Prediction

TARGET = "squall.conf.planner.auto.chosen_by_the_command"
_CHOSEN = "SQUALL_PLANNED"  # tells ranks that the first one starts what it has chosen


def chosen_by_the_command(**options: Any) -> None:
    """What ``strategy=auto`` is where nothing has chosen.

    Raises:
        MisconfigurationException: Always.

    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    raise MisconfigurationException(
        "strategy=auto is replaced by the command squall. In an application of your own, ask squall-plan, and name the"
        " strategy that it recommends."
    )


def is_auto(strategy: Any) -> bool:
    """Whether a strategy is to be chosen.

    Args:
        strategy: An entry of the group ``strategy``.

    """
    return isinstance(strategy, DictConfig) and str(strategy.get("_target_", "")) == TARGET


def choose(cfg: DictConfig, datamodule: Any) -> str:
    """Replace ``cfg.strategy`` and ``cfg.trainer.devices``, in place, by what the planner recommends on this machine.

    Args:
        cfg: The composed tree.
        datamodule: Says what a step is: ``batch_size`` and the sizes of its images.

    Returns:
        A sentence with the reason.

    Raises:
        UserError: If ranks were started by something else than ``squall``, or are on several hosts.

    """
    from squall.conf.main import UserError

    if _CHOSEN not in os.environ:
        if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1 or cfg.trainer.num_nodes != 1:
            raise UserError(
                "strategy=auto measures one machine before it starts ranks. On several, or under srun and torchrun, ask"
                " squall-plan, and name the strategy that it recommends."
            )
        os.environ[_CHOSEN] = json.dumps(_plan(cfg, datamodule))
    told = json.loads(os.environ[_CHOSEN])
    cfg.strategy = OmegaConf.create(told["strategy"])
    cfg.trainer.devices = told["devices"]
    return str(told["reason"])


def _plan(cfg: DictConfig, datamodule: Any) -> dict[str, Any]:
    from squall.conf.plan import task_of

    from .alternatives import Batch
    from .here import calibrate
    from .predictions import predict_all
    from .recommending import recommend

    options = cfg.strategy
    num_ranks = int(cfg.trainer.devices or options.num_ranks)
    images = {name: getattr(datamodule, name) for name in ("num_classes", "num_channels", "image_size")}
    task = task_of(cfg.model, images)
    batch = Batch(int(datamodule.batch_size), per_replica=True)
    only = [name for name in options.strategies if name != "downpour"]
    cluster = calibrate(task, batch, "loopback", num_ranks, {}, None, only)
    predictions, _ = predict_all(task, batch, cluster, {}, only)
    chosen, reason = recommend(predictions)
    return {
        "strategy": strategy_of(chosen),
        "devices": chosen.alternative.num_ranks,
        "reason": f"strategy=auto takes {chosen.alternative.label}: {reason}.",
    }


def strategy_of(chosen: Prediction) -> Mapping[str, Any]:
    """The entry of the group ``strategy`` that a recommendation stands for.

    Args:
        chosen: Of the planner.

    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    words = [word for word in chosen.alternative.overrides if not word.startswith("trainer.")]
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("squall.conf", version_base="1.3"):
            made = compose("squall", overrides=words).strategy
        entry: dict[str, Any] = OmegaConf.to_container(made, resolve=True)  # type: ignore[assignment]
        return entry
    finally:
        GlobalHydra.instance().hydra = before
