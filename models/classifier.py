"""The LightningModule that trains any of the networks, with the recipes of 2012 and 2014 and newer ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from .schedules import SCHEDULES, by_step, cosine, exponential_steps, one_cycle
from .views import ten_crops

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class ImageClassifier(L.LightningModule):
    """Train a network to classify images by cross entropy.

    Logged: ``train/loss`` each step; ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc`` and, above ten classes,
    ``val/acc_top5`` and ``test/acc_top5`` over the epoch and all ranks. Accuracies are between 0 and 1.

    The defaults are those of Krizhevsky et al. (2012, section 5): SGD, momentum 0.9, weight decay 5e-4 on weights and
    biases alike, the rate divided by ten when the validation error stops improving, three times.

    Args:
        model: Maps images, (N, C, H, W), to logits, (N, classes). Its ``image_size`` and ``in_channels`` make
            the example input if it has them, ``num_classes`` decides about the top-5 accuracy.
        optimizer: "sgd", "adam", "adamw", "adagrad", or a function of the parameters that makes an optimizer (then
            ``lr``, ``momentum``, ``weight_decay`` and ``bias_lr_factor`` are its business and aren't used).
        lr: Learning rate; the largest one for "one_cycle".
        momentum: Momentum of SGD.
        nesterov: Whether that is Nesterov's.
        weight_decay: Weight decay of weights and biases, as each optimizer means it.
        schedule: "plateau": section 5 of the 2012 paper, by ``val/acc``; "exponential_steps": the rate is divided by
            ``target_factor ** (1 / (num_lr_steps - 1))`` at equal distances, cuda-convnet2's ``dexp`` (Krizhevsky
            2014); "steps": divided by ten every ``steps_per_drop`` steps; "cosine" to 0; "one_cycle" (Smith 2018);
            "none".
        patience: Epochs without improvement that "plateau" waits.
        max_drops: How often "plateau" divides the rate by ten.
        target_factor: What "exponential_steps" divides the rate by in the end.
        num_lr_steps: Stretches of constant rate of "exponential_steps".
        steps_per_drop: Optimizer steps between the drops of "steps".
        warmup_fraction: Part of the training in which "one_cycle" raises the rate.
        bias_lr_factor: Multiplier of the biases' rate; cuda-convnet2's files have 2.
        test_views: 1, or 10 for the mean prediction of ten views (section 4.1). The test images have to be larger than
            ``model.image_size`` then, such as those of ``ImageFolderDataModule(test_views=10)``.

    Raises:
        ValueError: An argument has no such value, or ten views are asked of a model without an ``image_size``.

    Example:
        >>> from squall.models import LeNet5
        >>> ImageClassifier(LeNet5(), lr=0.05, schedule="cosine")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: str | OptimizerFactory = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-4,
        schedule: str = "plateau",
        patience: int = 5,
        max_drops: int = 3,
        target_factor: float = 250.0,
        num_lr_steps: int = 4,
        steps_per_drop: int = 25_000,
        warmup_fraction: float = 0.3,
        bias_lr_factor: float = 1.0,
        test_views: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(optimizer, str) and optimizer not in ("sgd", "adam", "adamw", "adagrad"):
            raise ValueError(f'optimizer must be "sgd", "adam", "adamw", "adagrad" or a function, got {optimizer!r}')
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if num_lr_steps < 2:
            raise ValueError(f"num_lr_steps must be at least 2, got {num_lr_steps}")
        if steps_per_drop < 1:
            raise ValueError(f"steps_per_drop must be at least 1, got {steps_per_drop}")
        if test_views not in (1, 10):
            raise ValueError(f"test_views must be 1 or 10, got {test_views}")
        if test_views == 10 and not hasattr(model, "image_size"):
            raise ValueError("test_views=10 needs a model with an attribute image_size, the side of its views")
        # A function has no place in a checkpoint that is to be loaded with weights_only.
        self.save_hyperparameters(ignore=["model"] if isinstance(optimizer, str) else ["model", "optimizer"])
        self.model = model
        self.optimizer = optimizer
        self.num_classes: int = getattr(model, "num_classes", 0)
        side, colours = getattr(model, "image_size", None), getattr(model, "in_channels", None)
        if isinstance(side, int) and isinstance(colours, int):
            self.example_input_array = torch.zeros(2, colours, side, side)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, (N, C, H, W), to logits, (N, classes)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the mean cross entropy of a batch of images and labels."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies of a batch."""
        images, labels = batch
        logits = self(images)
        self._log_quality("val", F.cross_entropy(logits, labels), logits, labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies of a batch, of ten views a image if asked."""
        images, labels = batch
        log_probabilities = self._predict(images)
        self._log_quality("test", F.nll_loss(log_probabilities, labels), log_probabilities, labels)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities, (N, classes)."""
        return self._predict(batch[0]).exp()

    def _predict(self, images: Tensor) -> Tensor:
        """Log probabilities, (N, classes): the mean of the softmax over the views, as the paper has it."""
        if self.hparams["test_views"] == 1:
            return F.log_softmax(self(images), dim=1)
        size = int(self.model.image_size)  # type: ignore[arg-type]
        if min(images.shape[-2:]) <= size:
            raise ValueError(
                f"test_views=10 needs test images larger than the model's {size} pixels, got "
                f"{tuple(images.shape[-2:])}; give the DataModule test_views=10 too, or leave test_views at 1"
            )
        views = ten_crops(images, size)
        logits = self(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return F.log_softmax(logits, dim=2).logsumexp(1) - math.log(views.shape[1])

    def _log_quality(self, stage: str, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        values = {f"{stage}/loss": loss, f"{stage}/acc": (scores.argmax(1) == labels).float().mean()}
        num_classes = self.num_classes or scores.shape[1]
        if num_classes > 10:
            hits = scores.topk(5, dim=1).indices == labels.unsqueeze(1)
            values[f"{stage}/acc_top5"] = hits.any(1).float().mean()
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule as the arguments say.

        Raises:
            MisconfigurationException: The schedule needs to know how long training is, and the Trainer doesn't say.

        """
        optimizer = self._optimizer()
        schedule, options = self.hparams["schedule"], self.hparams
        if schedule == "none":
            return optimizer
        if schedule == "plateau":
            smallest = [group["lr"] * 0.1 ** options["max_drops"] for group in optimizer.param_groups]
            # Of the least error, as in the paper; eps 0, or small rates would never drop.
            plateau = lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", factor=0.1, patience=options["patience"], min_lr=smallest, eps=0.0
            )
            # Not strict: a run without validation keeps its rate.
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/acc", "strict": False},
            }
        if schedule == "steps":
            drops = lr_scheduler.StepLR(optimizer, options["steps_per_drop"], gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": drops, "interval": "step"}}
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise MisconfigurationException(
                f'schedule="{schedule}" needs the length of training: give the Trainer max_epochs or max_steps'
            )
        total_steps = max(1, int(total_steps))
        scheduler: lr_scheduler.LRScheduler
        if schedule == "one_cycle":
            rise = partial(one_cycle, warmup_fraction=options["warmup_fraction"])
            scheduler = lr_scheduler.LambdaLR(optimizer, by_step(rise, total_steps))
        elif schedule == "cosine":
            scheduler = lr_scheduler.LambdaLR(optimizer, by_step(cosine, total_steps))
        else:
            factor = partial(
                exponential_steps, target_factor=options["target_factor"], num_steps=options["num_lr_steps"]
            )
            scheduler = lr_scheduler.LambdaLR(optimizer, by_step(factor, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        options = self.hparams
        groups: list[Any] = list(self.model.parameters())
        if not isinstance(self.optimizer, str):
            return self.optimizer(groups)
        if options["bias_lr_factor"] != 1.0:
            named = list(self.model.named_parameters())
            biases = [parameter for name, parameter in named if name.split(".")[-1] == "bias"]
            weights = [parameter for name, parameter in named if name.split(".")[-1] != "bias"]
            groups = [{"params": weights}, {"params": biases, "lr": options["lr"] * options["bias_lr_factor"]}]
        lr, decay = options["lr"], options["weight_decay"]
        if self.optimizer == "sgd":
            momentum, nesterov = options["momentum"], options["nesterov"]
            return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov)
        kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
        optimizer: Optimizer = kinds[self.optimizer](groups, lr=lr, weight_decay=decay)
        return optimizer
