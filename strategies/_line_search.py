"""What a line search over the whole batch can't do with, looked for before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils._pytree import tree_leaves

from ._due import callbacks_of
from ._leases import LeasedBatches, leased_batches, seeded
from .consistency.sandblaster.lbfgs import LbfgsOptions

_INSTEAD = 'or use Trainer(strategy="downpour")'
_NUM_LOOKED_AT = 4  # samples of a data set
_SETTINGS = ("lr", "history_size", "tolerance_grad", "tolerance_change")  # of torch's L-BFGS and of ours
_COUPLED = (SGD, Adam, Adagrad, Adadelta, RMSprop)  # add weight_decay times the weights to the gradient


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would make another function of the loss.

    Args:
        trainer: During ``fit``.

    Raises:
        MisconfigurationException: It names the argument.

    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "automatic_optimization=False: sandblaster decides where the loss is evaluated, so a training_step can't"
            f" step by itself. Return the loss, {_INSTEAD}."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: sandblaster sums the gradients of all portions"
            " anyway. Leave it at 1."
        )
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            raise MisconfigurationException(
                "GradientAccumulationScheduler: sandblaster sums the gradients of all portions anyway. Leave it out."
            )
    if is_overridden("configure_gradient_clipping", module):
        raise MisconfigurationException(
            f"{type(module).__name__}.configure_gradient_clipping clips the gradients of portions, which would no"
            f" longer be those of the loss, which a line search relies on. Leave it out, {_INSTEAD}."
        )
    every = trainer.__dict__.get("reload_dataloaders_every_n_epochs", 0)  # Lightning does not declare it
    if every:
        raise MisconfigurationException(
            f"reload_dataloaders_every_n_epochs={every}: a line search needs the same data in each epoch. Leave it at"
            f" 0, {_INSTEAD}."
        )
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={trainer.gradient_clip_val}: the gradients of portions would no longer be those of the"
            f" loss, which a line search relies on. Leave it at None, {_INSTEAD}."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        raise MisconfigurationException(
            f"precision={trainer.precision!r} scales the loss, step by step. Set precision='32-true' or 'bf16-mixed',"
            f" {_INSTEAD}."
        )


def decays_of(optimizers: Sequence[Optimizer], trainer: Trainer, options: LbfgsOptions) -> list[float]:
    """What an optimizer that isn't stepped says of the loss: the weight decay of each parameter.

    Args:
        optimizers: The module's.
        trainer: For what it would have done besides.
        options: What counts in place of its own.

    Returns:
        A number for each parameter, in the optimizer's order.

    Raises:
        MisconfigurationException: There is no single optimizer, or there are parameters that can't be optimized so.

    """
    if len(optimizers) != 1 or not optimizers[0].param_groups:
        raise MisconfigurationException(
            "configure_optimizers has to return one optimizer: it isn't stepped, but says which parameters are trained."
            " Return one that has all of them."
        )
    (optimizer,) = optimizers
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}(maximize=True): sandblaster minimises. Return the negative of what is to"
                " be large from training_step."
            )
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise MisconfigurationException(
                    f"A parameter of shape {tuple(parameter.shape)} is of {parameter.dtype}, in which differences of"
                    f" gradients are lost. Set precision='32-true' or '64-true', {_INSTEAD}."
                )
    is_coupled = isinstance(optimizer, _COUPLED) and not isinstance(optimizer, AdamW)
    is_coupled = is_coupled and not any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
    unused = [f"{type(optimizer).__name__} isn't stepped"]
    if isinstance(optimizer, torch.optim.LBFGS):
        (group,) = optimizer.param_groups
        others = [f"{name}={group[name]}" for name in _SETTINGS if group[name] != getattr(options, name)]
        unused = [f"settings are the Strategy's, and not LBFGS({', '.join(others)})"] if others else []
    if trainer.lr_scheduler_configs:
        unused.append("learning rate schedulers have no effect")
    decays = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for _ in group["params"]]
    if any(decays) and not is_coupled:
        unused.append(f"its weight_decay, which is no part of a loss under {type(optimizer).__name__}, has none either")
        decays = [0.0] * len(decays)
    if unused:
        rank_zero_warn(f"Under sandblaster the loss is minimised by L-BFGS with a line search: {', '.join(unused)}.")
    return decays


def warn_of_noise(module: LightningModule) -> None:
    """Say which layers make a line search compare values of different functions.

    Args:
        module: What is trained.

    """
    for name, layer in module.named_modules():
        if isinstance(layer, _DropoutNd) and layer.p > 0 and layer.training:
            rank_zero_warn(
                f"{name} ({type(layer).__name__}) draws anew at each evaluation, so a line search compares values of"
                " different functions, and may find no step. Set p=0, or expect it to end early."
            )
            break
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            rank_zero_warn(
                f"{name} ({type(layer).__name__}) normalises each portion by itself: the loss that is minimised depends"
                " on how the batch is cut, and running statistics are those of all points that a line search has tried."
            )
            break
    if is_overridden("on_after_batch_transfer", module) or is_overridden("on_before_batch_transfer", module):
        rank_zero_warn(
            f"{type(module).__name__} changes batches as they come. If it does so at random, a line search compares"
            " values of different functions: what is augmented must be the same in each epoch."
        )


def warn_of_random_data(dataset: Any, indices: Sequence[int]) -> None:
    """Say if a data set makes something else of a sample each time.

    Args:
        dataset: With ``__getitem__``; some of its samples are looked at twice.
        indices: Of its samples.

    """
    with seeded(0):
        for index in indices[:_NUM_LOOKED_AT]:
            first, again = (tree_leaves(dataset[index]) for _ in range(2))
            if any(_differ(a, b) for a, b in zip(first, again, strict=False)):
                rank_zero_warn(
                    f"{type(dataset).__name__} makes something else of a sample each time it is asked. A line search"
                    " compares values of different functions so, and ends where it finds no step that helps: leave"
                    " augmentation out (data.max_shift=0, data.flip=false in Squall's own data sets)."
                )
                return


def _differ(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and first.layout is not torch.strided:
        first, second = first.to_dense(), second.to_dense()
    if not isinstance(first, Tensor | np.ndarray):
        return False
    return first.shape != second.shape or bool(((first != second) & ((first == first) | (second == second))).any())


def leased_or_error(leased: object, loader: object) -> LeasedBatches:
    """The queue's end in a loader.

    Args:
        leased: What was made of the loader.
        loader: The user's.

    Raises:
        MisconfigurationException: If its batches can't be dealt out as portions.

    """
    batches = leased_batches(leased)
    if batches is None:
        raise MisconfigurationException(
            f"{type(loader).__name__} has no samples that could be dealt out as portions, of which each must count"
            f" once. Give the Trainer one DataLoader of a data set with __getitem__ and __len__, {_INSTEAD}."
        )
    return batches
