"""What has to be done with a module around its placing, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from .placement.module import split_parameters

INTERRUPTED = (
    "The run broke off, and the weights are still split over its ranks. "
    "Load the last checkpoint into a fresh module to go on."
)


def refuse_interrupted(module: LightningModule) -> None:
    """Refuse a module that a run which broke off has left in parts.

    Raises:
        MisconfigurationException: If it is one.

    """
    if next(split_parameters(module), None) is not None:
        raise MisconfigurationException(INTERRUPTED)


def run_eagerly(module: LightningModule) -> Any:
    """Keep torch.compile out of code whose tensors know more than their values.

    Returns:
        What ends it with ``__exit__``.

    """
    from torch._dynamo import OptimizedModule  # takes long to import

    compiled = [name for name, part in module.named_modules() if isinstance(part, OptimizedModule)]
    if compiled or module._compiler_ctx is not None:
        rank_zero_warn(
            f"{', '.join(compiled) or type(module).__name__} is compiled, but split over ranks it runs "
            "uncompiled: torch.compile can't follow what other ranks hold. Leave torch.compile out to silence this."
        )
    return torch.compiler.set_stance("force_eager")


def log_graph(module: LightningModule, loggers: Sequence[Logger]) -> None:
    """Let loggers trace the module while it is whole: they do it on rank 0 alone, where no other would answer."""
    for logger in loggers:
        if getattr(logger, "_log_graph", False):
            logger.log_graph(module)  # type: ignore[attr-defined]
            logger._log_graph = False  # type: ignore[attr-defined]


def num_images(batch: Any) -> int:
    """How many there are in a batch, as far as that can be told."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 1


def batch_size_of(trainer: Trainer) -> int | None:
    """How many examples a rank will get in a step, if that can be told before a loader is made.

    Of the DataLoader that ``fit`` was given, or the ``batch_size`` that the module, the data module, or the
    hyperparameters of either have, where Lightning's own tuner looks for it.
    """
    source = trainer.fit_loop._data_source
    if source.is_module():
        module = trainer.lightning_module
        found = lightning_getattr(module, "batch_size") if lightning_hasattr(module, "batch_size") else None
    else:
        loader = source.instance
        found = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
    return found if isinstance(found, int) and found > 0 else None
