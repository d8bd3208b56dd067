"""Fewer weights: train with a mask over each layer, which an algorithm moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from torch import Tensor, distributed
from torch.nn import Module, Parameter
from torch.optim import LBFGS, Optimizer

from ._compressed import check_contents, check_steps, write_compressed
from ._resumed import check_resumed, settings_of
from .launching import DDPStrategy
from .sparsity import (
    CompressedCheckpointIO,
    CompressionReport,
    MaskedTraining,
    SparseAlgorithm,
    SparseMomentum,
    densities,
    find_layers,
)
from .sparsity.coding import is_compressed
from .sparsity.compressing import CompressingTraining
from .sparsity.computing import SparseComputation
from .sparsity.layers import plain_name
from .sparsity.table import layer_table

KEY = "sparsity"  # of a checkpoint


class SparseStrategy(Strategy):
    """Train a stock LightningModule with few of its weights, from the first step to the last.

    The Strategy owns a mask for each weight of two dimensions or more; what a mask doesn't let live is exactly 0 in
    every forward pass, after every step of any optimizer, and in checkpoints, which keep the module's stock keys and
    have the masks under a key of their own, ``"sparsity"``. An algorithm moves the masks:
    :class:`~squall.sparsity.SparseMomentum`, :class:`~squall.sparsity.RigL`, :class:`~squall.sparsity.SET`, or one
    made of three functions (:class:`~squall.sparsity.DynamicSparsity`). Layers of one optimizer trade weights among
    themselves. :class:`~squall.sparsity.DeepCompression` begins with all weights, and ends with a small file.

    Computation is dense unless ``compute="sparse"``: what this saves is weights. Then linear layers and two-dimensional
    convolutions of few weights run the kernels that compute with these alone, forward and backward, in single precision
    on a CPU; elsewhere, and in steps whose dense gradient the algorithm reads, they stay dense. RigL reads it in one
    step of ``update_every``, sparse momentum in each, or one of ``dense_every``. Results are those of dense computation
    but for rounding.

    Args:
        sparsity: The algorithm; None for sparse momentum with 5 % of the weights.
        inner: "single" runs in this process on one device, "ddp" is data parallelism. Ranks have equal masks: the
            first one's.
        compute: "dense", or "sparse".
        **options: Passed on to Lightning's ``SingleDeviceStrategy`` or ``DDPStrategy``.

    Raises:
        MisconfigurationException: Before the first batch, if ``inner`` doesn't suit the devices, or the algorithm
            needs to know how long training is and the Trainer doesn't say; or a checkpoint goes on with another
            density, or with layers that were whole.
        ValueError: Before the first batch, if a pattern of ``dense`` names no layer, or no layer can be sparse.

    Metrics: ``density/<layer>`` and ``density/total``, ``sparsity/prune_rate`` of the last update, and
    ``sparsity/num_grown``, the weights that came to life, summed over an epoch.

    Averages of weights (EMA, SWA) are over several masks; they are cut to the current one when they are saved, and at
    the end of the training. Parameters that are frozen when training begins stay whole.

    ``ckpt_path`` may be a compressed file: one that ``CompressedCheckpointIO`` has written goes on as any checkpoint,
    and of :func:`~squall.sparsity.save_compressed`'s the weights are where a new training begins, or what is tested.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> strategy = squall.SparseStrategy(squall.sparsity.SparseMomentum(density=0.05))
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
        >>> trainer.world_size
        1

    """

    if TYPE_CHECKING:  # what this class leaves to Lightning's, which its two kinds have beside it
        root_device: Any
        is_global_zero: Any
        model_to_device: Any
        reduce: Any
        barrier: Any
        broadcast: Any
        all_gather: Any

    def __new__(cls, sparsity: SparseAlgorithm | None = None, inner: str = "single", **options: Any) -> SparseStrategy:
        """Make the kind of Strategy that ``inner`` names."""
        if cls is SparseStrategy:
            kinds: dict[str, type[SparseStrategy]] = {"single": SparseSingleDeviceStrategy, "ddp": SparseDDPStrategy}
            if inner not in kinds:
                raise MisconfigurationException(f"inner={inner!r} must be one of {', '.join(kinds)}.")
            cls = kinds[inner]
        return super().__new__(cls)

    def __init__(
        self,
        sparsity: SparseAlgorithm | None = None,
        inner: Literal["single", "ddp"] = "single",
        compute: Literal["dense", "sparse"] = "dense",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if compute not in ("dense", "sparse"):
            raise MisconfigurationException(f"compute={compute!r} must be 'dense' or 'sparse'.")
        sparsity = SparseMomentum() if sparsity is None else sparsity
        if not isinstance(sparsity, SparseAlgorithm):
            raise MisconfigurationException(
                f"sparsity={sparsity!r} must be an algorithm, such as squall.sparsity.SparseMomentum(density=0.05)."
            )
        self.sparsity = sparsity
        self.inner = inner
        self.compute = compute
        self._computation: SparseComputation | None = None
        self._training: MaskedTraining | None = None
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's state, until fit begins
        self._fitting = False
        self._report = False
        self.compression_report: CompressionReport | None = None  # of the file that Deep Compression ends with

    @property
    def training(self) -> MaskedTraining | None:
        """What owns the masks; None before fit."""
        return self._training

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which weights live, by parameter; empty before fit. Layers that aren't in it are dense."""
        return {} if self._training is None else dict(self._training.masks)

    # ------------------------------------------------------------------ setting up

    def setup(self, trainer: Trainer) -> None:
        """Set up as usual; then mask the module, and have the optimizers respect it."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.sparsity.needs_progress and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise MisconfigurationException(
                f"{self.sparsity} follows a schedule to the end of training: give the Trainer max_epochs or max_steps,"
                " or the algorithm schedule='constant'."
            )
        assert self.lightning_module is not None
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        found = find_layers(self.lightning_module, self.sparsity.dense)
        parameters = {name: parameter for name, parameter in found.items() if id(parameter) in held}
        is_new = self._training is None or not _same(self._training.parameters, parameters)
        if is_new:
            seed = torch.initial_seed() if self.sparsity.seed is None else self.sparsity.seed
            share = _from_first if self._is_shared else None
            self._training = self.sparsity.new_training(
                self.lightning_module, parameters, self.broadcast(seed), share, self._progress
            )
        assert self._training is not None
        self._training.expect(trainer.max_epochs, hurried=bool(getattr(trainer, "fast_dev_run", False)))
        if isinstance(self._training, CompressingTraining):
            check_contents(self.lightning_module, self._training)
        if is_new and self._loaded is None:
            self._training.reset()
        self._take_loaded()
        self._training.attach(self.optimizers)
        if self.compute == "sparse":
            training = self._training
            self._computation = SparseComputation(self.lightning_module, lambda: training.masks, training.wants_dense)
            self._computation.install(training.parameters)
        self._fitting = True

    @property
    def _is_shared(self) -> bool:
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def _progress(self) -> float:
        """The part of the training that is done, as far as the Trainer knows."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        parts = [0.0]
        if trainer.max_steps > 0:
            parts.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            begun = max(0, trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1)
            parts.append((trainer.current_epoch + begun / trainer.num_training_batches) / trainer.max_epochs)
        return min(1.0, max(parts))

    def on_train_start(self) -> None:
        """Say which layers are sparse."""
        super().on_train_start()
        if isinstance(self._training, CompressingTraining):
            assert self.lightning_module is not None
            check_steps(self.lightning_module.trainer, self._training)
        if self.is_global_zero:
            assert self.lightning_module is not None
            Console().print(layer_table(_parameters_of(self.lightning_module), self.masks, str(self.sparsity)))

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move the masks between epochs; and undo what callbacks did to dead weights."""
        super().on_train_batch_start(batch, batch_idx)
        training, module = self._training, self.lightning_module
        assert training is not None
        assert module is not None
        if batch_idx == 0:
            training.apply()
            self._report = True
        training.end_epoch(module.trainer.current_epoch)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step, and log what the masks are when they have changed."""
        output = super().training_step(*args, **kwargs)
        self._log()
        return output

    def post_backward(self, closure_loss: Tensor) -> None:
        """Under manual optimization, the gradients are complete now."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization and self._training is not None:
            self._training.cut_gradients()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step; under automatic optimization the gradients are complete when the closure has been called."""
        assert self.lightning_module is not None
        training = self._training

        def closed() -> Any:
            result = closure()
            if training is not None:
                training.cut_gradients()
            return result

        automatic = self.lightning_module.automatic_optimization
        return super().optimizer_step(optimizer, closed if automatic else closure, model, **kwargs)

    def _log(self) -> None:
        training, module = self._training, self.lightning_module
        if training is None or module is None or module._trainer is None or not (self._report or training.num_grown):
            return
        values: dict[str, Any] = {**densities(training.masks), **training.metrics()}
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        module.log_dict(values, **how)
        # All ranks count the same weights.
        module.log("sparsity/num_grown", training.num_grown / module.trainer.world_size, reduce_fx="sum", **how)
        training.num_grown, self._report = 0, False

    # ------------------------------------------------------------------ checkpoints

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, or a compressed file, which may be one or weights alone.

        Of a dense training there is no more than the weights for an algorithm that begins with them.
        """
        if (
            _is_local_file_protocol(checkpoint_path)
            and Path(checkpoint_path).is_file()
            and is_compressed(checkpoint_path)
        ):
            checkpoint = CompressedCheckpointIO().load_checkpoint(checkpoint_path)
        else:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        module = self.lightning_module
        fitting = module is not None and module.trainer.state.fn == TrainerFn.FITTING
        starts = self.sparsity.starts_from_weights or not {"loops", "optimizer_states", "epoch"} & checkpoint.keys()
        if not fitting or not starts or KEY in checkpoint:
            return checkpoint
        rank_zero_info("The checkpoint has no masks: its weights are where this training begins, with epoch 0.")
        left_out = ("loops", "callbacks")
        kept = {key: value for key, value in checkpoint.items() if key not in left_out}
        return kept | {"optimizer_states": [], "lr_schedulers": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and the masks if they are to be trained."""
        super().load_model_state_dict(checkpoint, strict)
        self._loaded = checkpoint.get(KEY, {})
        if self._fitting:
            self._take_loaded()

    def _take_loaded(self) -> None:
        loaded, self._loaded = self._loaded, None
        if self._training is None or loaded is None:
            return
        if loaded:
            self._training.load_state_dict(loaded)
            check_resumed(loaded, self.sparsity, self._training.parameters)
        else:
            if not self.sparsity.starts_from_weights:
                rank_zero_info("The checkpoint has no masks: the largest weights of each layer live.")
            self._training.reset(trained=True)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' state; that of dead weights goes, where the checkpoint was of a dense training."""
        super().load_optimizer_state_dict(checkpoint)
        if self._training is not None:
            self._training.apply()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write the masks too; what callbacks have put in place of the weights gets its zeros here."""
        training, module = self._training, self.lightning_module
        if training is not None and module is not None:
            named = _parameters_of(module)
            if all(named.get(name) is parameter for name, parameter in training.parameters.items()):
                checkpoint[KEY] = training.state_dict() | settings_of(self.sparsity, training.parameters)
                checkpoint["state_dict"] = training.masked_state_dict(checkpoint["state_dict"])
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # ------------------------------------------------------------------ the end

    def on_train_end(self) -> None:
        """Cut what callbacks have put in place of the weights; and write the compressed file, if there is to be one."""
        super().on_train_end()
        if self._training is not None:
            self._training.apply()
        if isinstance(self._training, CompressingTraining):
            assert self.lightning_module is not None
            if self.is_global_zero:
                self.compression_report = write_compressed(self.lightning_module, self._training)
            self.barrier("compressed")  # the file is there for every rank

    def teardown(self) -> None:
        """Leave the optimizers alone; the masks stay, for a fit that goes on."""
        if self._training is not None:
            self._training.detach()
        if self._computation is not None:
            self._computation.remove()
            self._computation = None
        self._fitting = False
        super().teardown()


class SparseSingleDeviceStrategy(SparseStrategy, SingleDeviceStrategy):
    """``SparseStrategy(inner="single")``: on the Trainer's one device."""

    # Filled in by the Trainer, as for Strategies of several devices.
    parallel_devices: list[torch.device] | None = None

    @property
    def root_device(self) -> torch.device:
        """The Trainer's device."""
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    def _configure_launcher(self) -> None:
        if self.parallel_devices is not None and len(self.parallel_devices) > 1:
            raise MisconfigurationException(
                f"inner='single' uses one device, and devices={len(self.parallel_devices)} asks for more:"
                " use SparseStrategy(inner='ddp') or Trainer(devices=1)."
            )


class SparseDDPStrategy(SparseStrategy, DDPStrategy):
    """``SparseStrategy(inner="ddp")``: every rank has the whole model and the first rank's masks."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Refuse what makes ranks part."""
        super().setup_optimizers(trainer)
        if self.world_size > 1 and any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "LBFGS searches along each rank's own loss, and ranks that part would wait for each other for ever:"
                " use SparseStrategy(inner='single'), or another optimizer."
            )


def _parameters_of(module: Module) -> dict[str, Parameter]:
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours)


def _from_first(tensor: Tensor) -> None:
    distributed.broadcast(tensor, src=0)
