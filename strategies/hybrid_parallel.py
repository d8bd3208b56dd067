"""Hybrid: convolutions data-parallel, fully connected layers in columns: one weird trick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.parallel.distributed import DistributedDataParallel
from torch.optim import Optimizer

from . import _zero
from ._due import callbacks_of
from ._masked import MaskedStrategy
from ._placing import INTERRUPTED, batch_size_of, log_graph, num_images, refuse_interrupted, run_eagerly
from .consistency.hooks import CodecHookState, codec_hook
from .launching import DDPStrategy
from .placement import checkpoint as distributed_checkpoint
from .placement.columns import Crossing
from .placement.hybrid.layout import plan_hybrid
from .placement.hybrid.linear import Event, ExampleColumns
from .placement.hybrid.schemes import Scheme, check_scheme
from .placement.hybrid.updates import (
    LearningRateRule,
    bucket_size,
    check_learning_rate_rule,
    learning_rate_factor,
    regrouped,
    scale_gradients,
    take_examples,
)
from .placement.layout import Layout, read_layout
from .placement.module import place, unplace, whole_state_dict
from .placement.optimizers import gather_optimizer_state, take_optimizer_state, whole_optimizer_state, wrap_step
from .placement.partition import Partition
from .placement.speeds import Speeds, measure_speeds
from .placement.tensor import ColumnParameter
from .sparsity import SparseAlgorithm

_CODEC = "codec"  # of a checkpoint


class HybridParallelStrategy(MaskedStrategy, DDPStrategy):
    """Replicate the convolutions of a stock LightningModule, and split its linear layers by outputs.

    "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014): convolutions have few weights
    and do most of the work, so ranks replicate them and average their gradients; fully connected layers have most of
    the weights, so each rank holds, computes and trains its own outputs of them, and activations travel instead.

    To the module this is data parallelism: ``training_step`` sees this rank's batch, all features of its activations,
    and its own logits. Inside of a linear layer every rank's examples meet every rank's columns, in the passes that
    ``scheme`` says, and what the next pass reads travels while one computes. Forward, gradients and steps are those of
    one device with the batches of all ranks (whose losses are means over their examples, as under DDP).

    Args:
        scheme: Which examples go through a linear layer together (section 4): ``"a"``, all at once; ``"b"``, one rank's
            at a time; ``"c"``, a part of every rank's at a time, so that all links are busy in every pass.
        zero_stage: How what is replicated is trained: by DeepSpeed's ZeRO (Rajbhandari et al. 2020), which partitions
            its optimizer state (1), gradients (2) and weights (3) over the ranks, or nothing (0), on any device;
            ``None`` is torch's DDP. The function is the same. Where DeepSpeed is not installed, or can't do what the
            training needs, 0 and 1 are DDP, with a warning that says why, and 2 and 3 are an error.
        fc_update: When linear layers are updated: once a ``"step"``, or after every ``"pass"`` with the gradients of
            its examples (section 4.1, variable batch size; schemes with several passes). Then ``training_step`` is
            called once a pass, with its part of the batch, and convolutions are updated once all are through.
        lr_rule: ``"none"`` takes learning rates as they are. ``"linear"`` and ``"sqrt"`` take them for those of one
            rank's batch: what is updated by the batches of K ranks at once has K or sqrt(K) times the rate (section 5);
            so do convolutions always, and linear layers unless they are updated after every pass.
        codec: How the gradients of what is replicated travel: ``"fp32"`` (as they are), ``"bf16"``, ``"int8"``,
            ``"1bit"``, ``"topk"``, as of :func:`squall.consistency.get_codec`. DeepSpeed knows no codes.
        sparsity: Which weights live: an algorithm, such as :class:`~squall.sparsity.SparseMomentum`, or ``None`` for
            all. Masks are decided on by whole layers. DeepSpeed and ``fc_update="pass"`` know none.
        layout: ``"auto"``, or what differs from it: ``{linear layer or pattern: "columns" | "whole"}``, a
            :class:`~squall.placement.Layout`, or the path of a YAML file with such lines. A linear layer is in columns
            as long as these send less than its gradients, ``B (m + n) < 2 m n``; beyond, at the batch size that the
            DataLoader, the module or its data module has, the link is measured, and the faster of both is taken.
        deepspeed_config: Entries of DeepSpeed's configuration, or the path of a file with some.
        **options: Passed on to Lightning's ``DDPStrategy``.

    Raises:
        MisconfigurationException: Before the first batch, if an argument is none of these, the module has no linear
            layer that can be split or nothing else to train, the Trainer does something that ``fc_update="pass"``
            can't be done with, or ``zero_stage`` 2 or 3 is asked for with ``codec`` or ``sparsity``.
        ValueError: ``codec`` is none; and before the first batch, if ``sparsity`` is Deep Compression, or ``dense``
            names no layer.

    What fails: a rank that raises or dies ends the run on all ranks, with one message. Ranks must run the same linear
    layers in the same order; where they don't, all of them raise. Validation and test outside of ``fit`` run the whole
    module on each rank.

    Metrics, of the step before: ``crossings/<layer>`` are the floats that a rank sends for that layer per image of its
    own in the forward pass, ``crossings/data-parallel gradients`` is 0 there, since these are sent backward;
    ``crossings/bytes`` are the bytes per image in both passes, ``crossings/step_bytes`` those of the whole step, and
    ``crossings/seconds_waiting`` the part of a step in which nothing was computed because a pass had not arrived.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="hybrid_parallel", accelerator="cpu", devices=2)
        >>> trainer.strategy.scheme
        'c'

    """

    def __init__(
        self,
        scheme: Scheme = "c",
        zero_stage: Literal[0, 1, 2, 3] | None = 1,
        *,
        fc_update: Literal["step", "pass"] = "step",
        lr_rule: LearningRateRule = "none",
        codec: str = "fp32",
        sparsity: SparseAlgorithm | None = None,
        layout: str | Path | Mapping[str, str] | Layout = "auto",
        deepspeed_config: Mapping[str, Any] | str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sparsity=sparsity, **options)
        check_scheme(scheme)
        check_learning_rate_rule(lr_rule)
        if zero_stage not in (None, 0, 1, 2, 3) or isinstance(zero_stage, bool):
            raise MisconfigurationException(f"zero_stage={zero_stage!r} must be 0, 1, 2, 3, or None for DDP.")
        if fc_update not in ("step", "pass"):
            raise MisconfigurationException(f"fc_update={fc_update!r} must be 'step' or 'pass'.")
        if fc_update == "pass" and scheme != "c":
            raise MisconfigurationException(
                f"fc_update='pass' with scheme={scheme!r}: only passes of equal parts of every rank's examples can be "
                "updated by. Use scheme='c', or fc_update='step'."
            )
        if fc_update == "pass" and sparsity is not None:
            raise MisconfigurationException(
                "fc_update='pass' with sparsity: masks move by the steps of whole batches. Use fc_update='step', or "
                "sparsity=None."
            )
        self.scheme: Scheme = scheme
        self.zero_stage = zero_stage
        self.fc_update = fc_update
        self.lr_rule: LearningRateRule = lr_rule
        self.layout: Layout | None = None
        self._overrides = dict(read_layout(layout))
        self.codec = codec
        self._codes = None if codec == "fp32" else CodecHookState(codec)
        if self._codes is not None and options.get("ddp_comm_hook") is not None:
            raise MisconfigurationException(
                f"codec={codec!r} and ddp_comm_hook are two ways to send gradients. Leave one of them out."
            )
        self._owed: Mapping[str, Any] | None = None  # of a checkpoint: what codes had lost
        self._coded: list[str] = []
        self._deepspeed_config = _zero.read_config(deepspeed_config, zero_stage)
        self._engine: _zero.ZeroEngine | None = None
        self._columns = ExampleColumns(None, 0, 1, scheme)
        self._crossings: list[Crossing] = []
        self._timeline: list[Event] = []
        self._num_images = 1
        self._pass: int | None = None  # that training_step is called for
        self._in_training_step = False
        self._stance: Any = None  # of torch.compile, while the module is split

    @property
    def crossings(self) -> list[Crossing]:
        """What each layer sent per image in the last training step, forward and backward."""
        return self._columns.ledger.crossings if self._in_training_step else self._crossings

    @property
    def timeline(self) -> list[Event]:
        """What this rank did in the passes of the last training step, in the order in which it ended."""
        return self._columns.timeline if self._in_training_step else self._timeline

    # ------------------------------------------------------------------ the module

    def setup(self, trainer: Trainer) -> None:
        """Place the module if it is to be trained, then let the optimizers see what this rank holds."""
        assert self.lightning_module is not None
        refuse_interrupted(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_updates(trainer)
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Split the linear layers. What averages the gradients of the rest comes with the optimizers."""
        module = self.lightning_module
        assert module is not None
        sizes = self._all_told(batch_size_of(module.trainer))
        num_examples = None if None in sizes else sum(sizes)
        if self.world_size > 1:
            # A group of its own: DDP's messages must not come between those of the passes.
            group = dist.new_group(timeout=self._timeout)
            self._columns = ExampleColumns(group, self.global_rank, self.world_size, self.scheme)
        measure = self._measure if self.fc_update == "step" else None  # what is replicated isn't updated by passes
        self.layout = plan_hybrid(module, self.world_size, self._overrides, num_examples, measure)
        if self.world_size > 1:
            self._place(module, self.layout)

    def _all_told(self, value: Any) -> list[Any]:
        told: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(told, value)
        return told

    def _measure(self) -> Speeds:
        speeds = measure_speeds(self._columns, self.root_device)
        rank_zero_info(f"The layout is for {speeds}.")
        return speeds

    def _place(self, module: LightningModule, layout: Layout) -> None:
        self._stance = self._stance or run_eagerly(module)
        log_graph(module, module.trainer.loggers)
        rank_zero_info(f"Where each layer lives:\n{layout}")
        with torch.no_grad():
            for parameter in module.parameters():
                dist.broadcast(parameter.data, src=0)
        place(module, layout, self._columns)
        names = [
            name for name, parameter in module.named_parameters(remove_duplicate=False)
            if isinstance(parameter, ColumnParameter)
        ]  # fmt: skip
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)

    def _check_updates(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        if self.fc_update == "step":
            return
        problem = None
        if not module.automatic_optimization:
            problem = "manual optimization"
        elif trainer.accumulate_grad_batches != 1:
            problem = f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
        elif any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)):
            problem = "GradientAccumulationScheduler"
        elif is_overridden("configure_gradient_clipping", module):
            problem = f"{type(module).__name__}.configure_gradient_clipping, as not all gradients are there at once"
        elif trainer.gradient_clip_val:
            problem = f"gradient_clip_val={trainer.gradient_clip_val}, a norm of gradients that are not there at once,"
        elif getattr(self.precision_plugin, "scaler", None) is not None:
            problem = f"precision={trainer.precision!r}, which scales the loss,"
        if problem:
            raise MisconfigurationException(f"fc_update='pass' can't be done with {problem}. Use fc_update='step'.")

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make optimizers right for split parameters, and put DeepSpeed or torch's DDP around the module."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            wrap_step(optimizer, self.reduce if self.world_size > 1 else None)
            if not optimizer._squall_elementwise and (self.lr_rule != "none" or self.fc_update == "pass"):  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    f"lr_rule={self.lr_rule!r} and fc_update={self.fc_update!r} need an optimizer that treats every "
                    f"weight alone, which {type(optimizer).__name__} doesn't. Use lr_rule='none', fc_update='step'."
                )
        if self.fc_update == "pass" and len(self.optimizers) != 1:
            raise MisconfigurationException(
                f"fc_update='pass' needs one optimizer, not {len(self.optimizers)}. Use fc_update='step'."
            )
        module = self.lightning_module
        if self.zero_stage is None or self.world_size == 1:
            self._average_by_ddp()
            return
        reason = self._reason_against_masks_and_codes() or _zero.reason_against(
            module, trainer, self.optimizers, self.fc_update, self.precision_plugin
        )
        if reason and self.zero_stage >= 2:
            raise MisconfigurationException(
                f"zero_stage={self.zero_stage} is not possible: {reason}. Use zero_stage=None, which is torch's DDP."
            )
        if reason:
            rank_zero_warn(
                f"zero_stage={self.zero_stage} is done without, by torch's DDP, with optimizer state on every rank: "
                f"{reason}. Use zero_stage=None to silence this."
            )
            self._average_by_ddp()
            return
        assert module is not None
        self._engine = _zero.ZeroEngine(module, self.optimizers[0], self._deepspeed_config, self.root_device)
        self.model = self._engine.engine

    def _reason_against_masks_and_codes(self) -> str:
        if self.sparsity is not None:
            return "sparsity has masks, which its own copies of weights would not respect"
        return f"codec={self.codec!r} codes gradients, which it averages as they are" if self._codes is not None else ""

    def _average_by_ddp(self) -> None:
        """Put torch's DDP around what is replicated, with codes for what it sends.

        That is so little that its buckets would take all of it, and none could leave before the backward pass is over.
        """
        assert self.lightning_module is not None
        averaged = {
            name: parameter
            for name, parameter in self.lightning_module.named_parameters()
            if parameter.requires_grad and not isinstance(parameter, ColumnParameter)
        }
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in averaged.values())
        self._ddp_kwargs.setdefault("bucket_cap_mb", bucket_size(num_bytes) / 2**20)
        super().configure_ddp()
        if self._codes is None or self.world_size == 1:
            return
        assert isinstance(self.model, DistributedDataParallel)
        self._coded = list(averaged)[::-1]  # as their residuals are numbered
        if self._owed is not None:  # maybe under another layout
            known = dict(zip(self._owed.get("names", self._coded), self._owed["residuals"], strict=False))
            rows = [known.get(name, torch.zeros(averaged[name].numel())) for name in self._coded]
            self._codes.load_state_dict({**self._owed, "residuals": rows})
            self._owed = None
        self.model.register_comm_hook(self._codes, codec_hook)

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step, on the examples of the pass if it is called for one, and log what crossed before."""
        if not self._pass:
            self._keep_figures()
            self._in_training_step = True
            self._num_images = num_images(args[0]) if args else 1
            self._columns.start_step(self._num_images)
            self._log_crossings()
        if self._pass is not None:
            args = (take_examples(args[0], self._num_images, self._pass, self.world_size), *args[1:])
        return super().training_step(*args, **kwargs)

    def _keep_figures(self) -> None:
        if self._in_training_step:
            self._crossings, self._timeline = self._columns.ledger.crossings, self._columns.timeline

    def _start_evaluation(self, args: tuple[Any, ...]) -> None:
        self._keep_figures()
        self._in_training_step = False
        self._columns.start_step(num_images(args[0]) if args else 1)

    def on_validation_start(self) -> None:
        """Every rank validates with the first one's running statistics, as under DDP."""
        self._share_buffers()

    def on_train_end(self) -> None:
        """Every rank ends with the first one's running statistics."""
        self._share_buffers()
        super().on_train_end()

    def _share_buffers(self) -> None:
        if self._engine is not None and self.lightning_module is not None:  # DDP does it by itself
            for buffer in self.lightning_module.buffers():
                dist.broadcast(buffer, src=0)

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step."""
        self._start_evaluation(args)
        return super().validation_step(*args, **kwargs)

    def _log_crossings(self) -> None:
        module = self.lightning_module
        assert module is not None
        if not self._crossings or module._trainer is None:
            return
        values = {f"crossings/{crossing.name}": crossing.floats_per_image_forward for crossing in self._crossings}
        per_image = sum(crossing.bytes_per_image for crossing in self._crossings)
        values["crossings/bytes"] = per_image
        values["crossings/step_bytes"] = per_image * self._num_images
        values["crossings/seconds_waiting"] = sum(event.waited for event in self._timeline)
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute all gradients."""
        if self._engine is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._engine.backward(closure_loss)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def post_backward(self, closure_loss: Tensor) -> None:
        """Note what averaging gradients sends, in a ring: once around to add up, once for all to have it."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if self.world_size == 1 or not getattr(self.model, "require_backward_grad_sync", True):
            return
        if self._codes is not None:
            self._columns.ledger.record("data-parallel gradients", self._codes.bytes_per_step, 1, True)
            return
        rounds = 3 if self._engine is not None and self._engine.stage == 3 else 2  # weights travel forward and backward
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad and not isinstance(parameter, ColumnParameter):
                num_elements = getattr(parameter, "ds_numel", parameter.numel())
                sent = rounds * (self.world_size - 1) * num_elements // self.world_size
                self._columns.ledger.record("data-parallel gradients", sent, parameter.element_size(), True)

    # ------------------------------------------------------------------ optimizers

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step once, or linear layers after each pass and the rest at the end, at the rates that ``lr_rule`` gives."""
        if self.fc_update == "pass" and self.world_size > 1:
            return self._step_every_pass(optimizer, closure, model, **kwargs)
        if self._engine is not None:
            factor = learning_rate_factor(self.lr_rule, self.world_size)
            with regrouped(optimizer, lambda parameter: factor if isinstance(parameter, ColumnParameter) else None):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
            self._engine.step(factor)
            return output
        if self.lr_rule == "none" or self.world_size == 1:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        with regrouped(optimizer, self._rate_after_step):
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _step_every_pass(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None,
        **kwargs: Any,
    ) -> Any:
        assert isinstance(self.model, DistributedDataParallel)
        shared = [parameter for parameter in self.model.parameters() if not isinstance(parameter, ColumnParameter)]
        for parameter in shared:
            parameter.grad = None
        sizes: tuple[int, ...] = ()
        try:
            for number in range(self.world_size):
                self._pass = number
                if number:
                    sizes = Partition.even(self._num_images, self.world_size).sizes
                    scale_gradients(shared, sizes[number - 1] / sizes[number])
                # The closure clears the gradients of what is stepped; those of convolutions add up over the passes.
                last = number == self.world_size - 1
                with nullcontext() if last else self.model.no_sync(), regrouped(optimizer, self._rate_after_pass):
                    output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._pass = None
        scale_gradients(shared, sizes[-1] / sum(sizes))
        with regrouped(optimizer, self._rate_after_step):
            super().optimizer_step(optimizer, lambda: output, model, **kwargs)
        return output

    def _rate_after_pass(self, parameter: Tensor) -> float | None:
        """What is updated with one rank's number of examples, and at what multiple of its rate."""
        return 1.0 if isinstance(parameter, ColumnParameter) else None

    def _rate_after_step(self, parameter: Tensor) -> float | None:
        """What is updated with all examples, and at what multiple of its rate."""
        if self.fc_update == "pass" and isinstance(parameter, ColumnParameter):
            return None
        return learning_rate_factor(self.lr_rule, self.world_size)

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer state that one device would hold."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with nullcontext() if self._engine is None else self._engine.whole_state():
            return whole_optimizer_state(plain)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of whole states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(take_optimizer_state(optimizer, state))
            _optimizer_to_device(optimizer, self.root_device)
        self._apply_masks()
        if self._engine is not None:
            self._engine.take_state()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict that one device would hold."""
        assert self.lightning_module is not None
        if self._engine is None:
            return whole_state_dict(self.lightning_module)
        with self._engine.whole_weights():
            return {key: value.clone() for key, value in whole_state_dict(self.lightning_module).items()}

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or a directory that columns have written."""
        self._owed = None
        if distributed_checkpoint.is_distributed(Path(checkpoint_path)):
            return distributed_checkpoint.read_whole(Path(checkpoint_path))
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._is_fitting:
            self._owed = checkpoint.get(_CODEC)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one plain file, with the mean of what the ranks' codes have lost, if they make up for it later."""
        if self._codes is not None and self._codes.codec.has_residual:
            checkpoint[_CODEC] = self._codes.mean_state_dict() | {"names": self._coded}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Nobody answers any more: keep teardown from asking, and hang up, so that those who wait hear of it."""
        self._columns.close(INTERRUPTED)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give the module back whole, as it came."""
        module = self.lightning_module
        if self._engine is not None:
            self._engine.close(self._columns.closed)
            self.model, self._engine = module, None
        if module is not None and not self._columns.closed:
            for optimizer in self.optimizers:
                gather_optimizer_state(optimizer)
            self._hold_whole_masks()
            unplace(module)
        if module is not None and hasattr(module, "_ddp_params_and_buffers_to_ignore"):
            for parameter in module.parameters():
                vars(parameter).pop("_ddp_ignored", None)
            del module._ddp_params_and_buffers_to_ignore
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        super().teardown()
