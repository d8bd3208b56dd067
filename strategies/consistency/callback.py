"""The hook as a Lightning callback, which works wherever DDP does and saves what the hook keeps."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from .codecs import Codec
from .hooks import CodecHookState, codec_hook


class CodecHook(Callback):
    """Send gradients as codes under Lightning's stock ``"ddp"``, on gloo and on NCCL.

    DDPStrategy's own ``ddp_comm_hook`` is for GPUs only: on CPUs Lightning leaves it out without a word. Checkpoints
    hold the mean of the ranks' residuals, so training resumes from them with any number of ranks; the rest of them is
    what it would be without this callback.

    Metric: ``codec/bytes_per_step``, the bytes that a rank sent to others in a step.

    Args:
        codec: A codec or its name, as :func:`squall.consistency.get_codec` takes them.

    Example:
        >>> hook = CodecHook("int8")
        >>> # Trainer(strategy="ddp", devices=2, callbacks=[hook])
        >>> hook.state.codec.name
        'int8'

    """

    def __init__(self, codec: str | Codec = "int8") -> None:
        self.state = CodecHookState(codec)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hook; gradients flow after this only."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            strategy = type(trainer.strategy).__name__
            raise MisconfigurationException(
                f"CodecHook needs gradients that DistributedDataParallel averages, and {strategy} has none. Use "
                "Trainer(strategy='ddp'), or leave the callback out."
            )
        if model._comm_hooks:
            raise MisconfigurationException(
                "CodecHook can't share DistributedDataParallel with another communication hook. Leave "
                "DDPStrategy(ddp_comm_hook=...) out, or the callback."
            )
        model.register_comm_hook(self.state, codec_hook)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the bytes sent."""
        pl_module.log("codec/bytes_per_step", float(self.state.bytes_per_step))

    def state_dict(self) -> dict[str, Any]:
        """What the hook keeps; Lightning calls this on all ranks."""
        return self.state.mean_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from it."""
        self.state.load_state_dict(state_dict)
