"""The command ``squall``: train, validate or test one model under one Strategy, as the tree beside this file says."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from squall.conf.planner.auto import choose, is_auto

MODES = ("fit", "validate", "test")
# What a model file leaves null, and the attribute of the DataModule that fills it in.
_WITH_ADAGRAD = ("DownpourStrategy", "HogwildStrategy")
# What a rank other than the first is told: the job's folder is written by one.
WRITES_NOTHING = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
FROM_DATA = {"num_classes": "num_classes", "in_channels": "num_channels", "image_size": "image_size"}


class UserError(Exception):
    """Something the user can put right; the message says what, and no traceback is shown."""


def num_devices(cfg: DictConfig) -> int:
    """Say how many processes of this host a configuration needs.

    Args:
        cfg: The configuration; ``trainer.devices`` decides unless it is null.

    Returns:
        ``trainer.devices``; or else, of all ``trainer.num_nodes`` together, 1 for the single-device Strategy, columns
        times replicas for one that has them, and 2.

    Raises:
        UserError: If several processes are asked of a Strategy that uses one, or hosts can't share them evenly.

    """
    strategy = cfg.strategy
    single = str(strategy.get("_target_", "")).endswith("SingleDeviceStrategy") or strategy.get("inner") == "single"
    asked, num_nodes = cfg.trainer.get("devices"), int(cfg.trainer.get("num_nodes") or 1)
    if single and num_nodes > 1:
        raise UserError(f"This strategy uses one process: leave trainer.num_nodes={num_nodes} out.")
    if asked is not None:
        if single and str(asked) not in ("1", "auto"):
            raise UserError(
                f"This strategy uses one process: leave trainer.devices={asked} out, or take"
                f" {'strategy.inner' if 'inner' in strategy else 'strategy'}=ddp."
            )
        return 1 if single else asked
    if single:
        return 1
    for ranks in ("num_columns", "num_tiles"):
        if strategy.get(ranks) is not None:
            per_replica = math.prod(strategy[ranks]) if isinstance(strategy[ranks], ListConfig) else strategy[ranks]
            is_downpour = str(strategy.get("_target_", "")).endswith("DownpourStrategy")  # of one replica it is none
            num_replicas = max(2, num_nodes) if is_downpour else int(strategy.get("data_parallel_size") or 1)
            num_ranks = int(per_replica) * num_replicas
            if num_ranks % num_nodes:
                raise UserError(
                    f"trainer.num_nodes={num_nodes} hosts can't share {num_ranks} ranks evenly: set trainer.num_nodes"
                    f" to a divisor of {num_ranks}, or strategy.{ranks}=<number of ranks>."
                )
            return num_ranks // num_nodes
    return max(2 // num_nodes, 1)


def fill_from_data(node: Any, datamodule: Any) -> None:
    """Replace, in place and at any depth, what a model file leaves null with what the data says.

    Args:
        node: The model's configuration.
        datamodule: Has the attributes ``num_classes``, ``num_channels`` and ``image_size``.

    """
    if isinstance(node, DictConfig):
        for key in list(node):
            if key in FROM_DATA and node[key] is None:
                node[key] = getattr(datamodule, FROM_DATA[str(key)])
            else:
                fill_from_data(node[key], datamodule)


def choose_optimizer(cfg: DictConfig) -> None:
    """Replace, in place, an optimizer and a learning rate that are left null.

    Asynchronous training has Adagrad, as in Dean et al. (2012, section 4.1), all else SGD.

    Args:
        cfg: The composed tree.

    """
    target = str(cfg.strategy.get("_target_")) if isinstance(cfg.strategy, DictConfig) else ""
    if "optimizer" in cfg.model and cfg.model.optimizer is None:
        cfg.model.optimizer = "adagrad" if target.endswith(_WITH_ADAGRAD) else "sgd"
    if "lr" in cfg.model and cfg.model.lr is None:
        cfg.model.lr = 0.01 if cfg.model.optimizer == "adagrad" else 0.03


def add_compressed(cfg: DictConfig) -> None:
    """Have the Trainer read a compressed file, in place, if ``ckpt_path`` is one and nothing else reads it.

    Args:
        cfg: The composed tree.

    Raises:
        UserError: If it is to be trained on under a Strategy that doesn't read it.

    """
    from squall.sparsity.coding import is_compressed

    sparse = str(cfg.strategy.get("_target_", "")).endswith(".SparseStrategy")
    if cfg.trainer.get("plugins") is not None or sparse or cfg.ckpt_path is None:
        return
    if not Path(cfg.ckpt_path).is_file() or not is_compressed(cfg.ckpt_path):
        return
    if cfg.mode == "fit":
        raise UserError(
            f"ckpt_path={cfg.ckpt_path} is a compressed file. To go on from a whole checkpoint, add"
            " trainer/plugins=compressed; to begin with its weights, take a sparse strategy, or write a checkpoint by"
            " squall-compress --decode."
        )
    with open_dict(cfg):
        cfg.trainer.plugins = {"_target_": "squall.sparsity.CompressedCheckpointIO"}


def instantiate_all(node: DictConfig | None) -> list[Any]:
    """Make every object of a group whose file names several; an entry that is null is left out.

    Args:
        node: Named entries, each with a ``_target_``.

    Returns:
        The objects.

    """
    return [hydra.utils.instantiate(entry) for entry in (node or {}).values() if entry is not None]


def run(cfg: DictConfig) -> dict[str, float]:
    """Do what a configuration says.

    Args:
        cfg: The composed tree, see ``conf/squall.yaml``.

    Returns:
        The metrics of the last stage, by name.

    Raises:
        UserError: If the configuration asks for what can't be done, or data is missing.

    """
    from lightning.pytorch import seed_everything

    if cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode} is none of {', '.join(MODES)}.")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).exists():
        raise UserError(f"ckpt_path={cfg.ckpt_path}: there is no such file.")
    if cfg.ckpt_path is None and cfg.mode != "fit":
        raise UserError(f"mode={cfg.mode} needs a checkpoint: add ckpt_path=<run folder>/checkpoints/last.ckpt")
    if cfg.seed is not None:
        seed_everything(cfg.seed, workers=True, verbose=False)

    quiet_console()
    cfg = cfg.copy()
    with open_dict(cfg):
        datamodule = _make_datamodule(cfg.data)
        if is_auto(cfg.strategy):
            print(choose(cfg, datamodule))
        cfg.trainer.devices = num_devices(cfg)
        fill_from_data(cfg.model, datamodule)
        choose_optimizer(cfg)
    add_compressed(cfg)
    module = hydra.utils.instantiate(cfg.model)
    trainer = hydra.utils.instantiate(
        cfg.trainer,
        strategy=hydra.utils.instantiate(cfg.strategy),
        callbacks=instantiate_all(cfg.callbacks),
        logger=instantiate_all(cfg.logger) or False,
        enable_progress_bar=(cfg.callbacks or {}).get("progress") is not None,
        enable_checkpointing=(cfg.callbacks or {}).get("checkpoint") is not None,
    )
    if cfg.mode == "fit":
        trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
        metrics = dict(trainer.callback_metrics)
        if not trainer.interrupted:
            trainer.test(module, datamodule=datamodule, verbose=False)
            metrics |= trainer.callback_metrics
    else:
        stage = trainer.validate if cfg.mode == "validate" else trainer.test
        stage(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, verbose=cfg.mode == "validate")
        metrics = dict(trainer.callback_metrics)
    return {name: float(value) for name, value in metrics.items()}


def quiet_console() -> None:
    """Leave the console to the progress bar, the tables and warnings; the log file has the rest."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.propagate = True
        for handler in logger.handlers:
            handler.setLevel(logging.WARNING)
    # Lightning's own use of torch, nothing a user can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*`optimizer.step..` has been overridden.*")  # by a Strategy, rightly


def _make_datamodule(cfg: DictConfig) -> Any:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        names = ", ".join(f"{key}=<path>" for key in missing)
        raise UserError(f"This data set needs to be told where it lies: add {names}")
    datamodule = hydra.utils.instantiate(cfg)
    # Now rather than in every rank, so that missing data is one message.
    datamodule.prepare_data()
    return datamodule


def explain(error: BaseException) -> str | None:
    """Turn an error that its message explains into that message.

    Args:
        error: What ended the run.

    Returns:
        The message, or None if the error is a fault of the program, whose traceback is wanted.

    """
    from hydra.errors import HydraException, InstantiationException
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from squall.launching import RankFailedError

    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = explain(error.__cause__)
        named_wrongly = isinstance(error.__cause__, ImportError | TypeError)
        return str(error) if cause is None and named_wrongly else cause
    explained = (UserError, RankFailedError, MisconfigurationException, FileNotFoundError, ValueError)
    if isinstance(error, (*explained, HydraException, OmegaConfBaseException)):
        return str(error)
    return None


@hydra.main(version_base="1.3", config_path=".", config_name="squall")
def _app(cfg: DictConfig) -> dict[str, float]:
    from squall.launching import restored_environment

    with restored_environment():  # a seed of this job is not the next one's
        return run(cfg)


def main() -> None:
    """Run the command; a message and exit code 1 when the user's input is at fault."""
    report_errors(_app)


def report_errors(app: Any) -> None:
    """Run a Hydra application, and show those errors that their message explains without a traceback.

    Args:
        app: A function that :func:`hydra.main` has wrapped.

    """
    from squall.launching import restored_environment

    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) > 0:  # srun's, or torchrun's
        sys.argv += WRITES_NOTHING
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        app()
        return
    try:
        with restored_environment():
            os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise, rather than print and exit
            app()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        hint = "\n(HYDRA_FULL_ERROR=1 shows where this was raised.)" if type(error) is ValueError else ""
        sys.stderr.write(f"squall: {message}{hint}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
