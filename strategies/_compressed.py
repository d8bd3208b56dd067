"""The end of Deep Compression: one small file, the paper's table, and what the loggers get of it."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console

from .sparsity import CompressionReport, save_compressed
from .sparsity.coding import check_state_dict
from .sparsity.compressing import CompressingTraining
from .sparsity.layers import layer_name


def check_steps(trainer: Trainer, training: CompressingTraining) -> None:
    """Refuse a training whose steps end before its last phase begins.

    Args:
        trainer: About to run the first batch.
        training: With its phases laid out.

    Raises:
        MisconfigurationException: ``max_steps`` is too small.

    """
    if trainer.max_steps < 0 or training.hurried:
        return
    if not math.isfinite(trainer.num_training_batches):
        return  # an iterable data set doesn't say how long an epoch is
    steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    last = training.phases[-1]
    if last.epoch * steps_per_epoch >= trainer.max_steps:
        raise MisconfigurationException(
            f"max_steps={trainer.max_steps} ends the training before its last phase, which begins after epoch"
            f" {last.epoch} with step {last.epoch * steps_per_epoch}: leave it out, or make it larger."
        )


def check_contents(module: LightningModule, training: CompressingTraining) -> None:
    """Refuse a module that the compressed file can't hold, before it is trained.

    Args:
        module: To be trained.
        training: With its algorithm.

    Raises:
        MisconfigurationException: An entry of its state_dict can't be stored.

    """
    if training.algorithm.filename is None or training.hurried:
        return
    try:
        check_state_dict(module.state_dict())
    except ValueError as error:
        raise MisconfigurationException(
            f"The compressed file at the end of the training can't hold the module: {error} Or have no file:"
            " DeepCompression(filename=None)."
        ) from None


def write_compressed(module: LightningModule, training: CompressingTraining) -> CompressionReport | None:
    """Write the file, print the table, and log what it came to.

    Args:
        module: Trained.
        training: Its masks and shared values.

    Returns:
        What each tensor came to; None if no file is wanted.

    """
    trainer, algorithm = module.trainer, training.algorithm
    if algorithm.filename is None or training.hurried:
        return None
    if not training.is_complete:
        waiting = training.phases[training.num_begun]
        rank_zero_warn(
            f"The training has ended before the phase {waiting.name!r}, which was to begin with epoch {waiting.epoch}:"
            " the compressed file is larger than it could be."
        )
    folder = Path(algorithm.dirpath or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / algorithm.filename
    report = save_compressed(module.state_dict(), path, coder=algorithm.coder)
    Console().print(
        report.table(),
        report.sentence(path),
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    metrics = {"compression/rate": report.rate, "compression/file_bytes": float(report.num_file_bytes)}
    layers = set(map(layer_name, training.parameters))
    for row in report.rows()[:-1]:
        if row["layer"] in layers:
            metrics[f"compression/rate/{row['layer']}"] = float(row["rate"])
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    return report
