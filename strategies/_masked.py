"""A module of which an algorithm lets few weights live, whatever else a Strategy does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from ._compressed import check_contents, check_steps, write_compressed
from ._resumed import check_resumed, settings_of
from .placement.module import gather_part, split_parameters, take_part
from .placement.tensor import SplitParameter, local_view
from .sparsity import CompressedCheckpointIO, CompressionReport, MaskedTraining, SparseAlgorithm, densities, find_layers
from .sparsity.coding import is_compressed
from .sparsity.compressing import CompressingTraining
from .sparsity.layers import plain_name
from .sparsity.parts import Parts
from .sparsity.table import layer_table

KEY = "sparsity"  # of a checkpoint


class MaskedStrategy(Strategy):
    """Owns the masks of a training, beside the Strategy that comes after it among a class's bases.

    Args:
        *args: Of that Strategy.
        sparsity: The algorithm; None for all weights, and then nothing is done here.
        **options: Of that Strategy.

    Raises:
        MisconfigurationException: ``sparsity`` is no algorithm.

    """

    if TYPE_CHECKING:  # what this class leaves to the other
        root_device: Any
        is_global_zero: Any
        model_to_device: Any
        reduce: Any
        barrier: Any
        broadcast: Any
        all_gather: Any

    def __init__(self, *args: Any, sparsity: SparseAlgorithm | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if sparsity is not None and not isinstance(sparsity, SparseAlgorithm):
            raise MisconfigurationException(
                f"sparsity={sparsity!r} must be an algorithm, such as squall.sparsity.SparseMomentum(density=0.05)."
            )
        self.sparsity = sparsity
        self._training: MaskedTraining | None = None
        self._loaded: Mapping[str, Any] | None = None  # a checkpoint's state, until fit begins
        self._is_masked = False
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
        self._mask(trainer)

    def _mask(self, trainer: Trainer) -> None:
        """Mask a module that is where it is to be, and have the optimizers respect it."""
        if self.sparsity is None or trainer.state.fn != TrainerFn.FITTING:
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
            parts = self._find_parts()
            told = {} if parts is None else {"parts": parts}  # an algorithm of a user's may know of none
            self._training = self.sparsity.new_training(
                self.lightning_module, parameters, self._shared_seed(seed), share, self._part_done, **told
            )
        else:
            assert self._training is not None
            self._training.hold(self._find_parts())
        assert self._training is not None
        self._training.expect(trainer.max_epochs, hurried=bool(getattr(trainer, "fast_dev_run", False)))
        if isinstance(self._training, CompressingTraining):
            check_contents(self.lightning_module, self._training)
        if is_new and self._loaded is None:
            self._training.reset()
        self._take_loaded()
        self._training.attach(self.optimizers)
        self._is_masked = True

    def _find_parts(self) -> Parts | None:
        """What this rank holds of each weight; None for all of each."""
        assert self.lightning_module is not None
        split = next((parameter for _, parameter in split_parameters(self.lightning_module)), None)
        if split is None:
            return None
        for optimizer in self.optimizers:
            if not getattr(optimizer, "_squall_elementwise", True):
                raise MisconfigurationException(
                    f"sparsity={self.sparsity}: {type(optimizer).__name__} doesn't treat every weight alone, and here"
                    " ranks hold parts of them. Use another optimizer, or squall.SparseStrategy(inner='ddp')."
                )
        return SplitParts(split)

    def _shared_seed(self, seed: int) -> int:
        """The first rank's."""
        return int(self.broadcast(seed))

    @property
    def _is_shared(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def _num_counted(self) -> int:
        """How many ranks a sum over ranks counts."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer.world_size

    def _part_done(self) -> float:
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
        if self.sparsity is not None and self.is_global_zero:
            assert self.lightning_module is not None
            Console().print(layer_table(_parameters_of(self.lightning_module), self.masks, str(self.sparsity)))

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move the masks between epochs; and undo what callbacks did to dead weights."""
        super().on_train_batch_start(batch, batch_idx)
        training, module = self._training, self.lightning_module
        if training is None:
            return
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
            assert training is not None
            training.cut_gradients()
            return result

        cuts = training is not None and self.lightning_module.automatic_optimization
        return super().optimizer_step(optimizer, closed if cuts else closure, model, **kwargs)

    def _log(self) -> None:
        training, module = self._training, self.lightning_module
        if training is None or module is None or module._trainer is None or not (self._report or training.num_grown):
            return
        values: dict[str, Any] = {**densities(training.masks), **training.metrics()}
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        module.log_dict(values, **how)
        # All ranks count the same weights.
        module.log("sparsity/num_grown", training.num_grown / self._num_counted, reduce_fx="sum", **how)
        training.num_grown, self._report = 0, False

    # ------------------------------------------------------------------ checkpoints

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, or a compressed file, which may be one or weights alone.

        Of a dense training there is no more than the weights for an algorithm that begins with them.
        """
        if self.sparsity is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        if (
            _is_local_file_protocol(checkpoint_path)
            and Path(checkpoint_path).is_file()
            and is_compressed(checkpoint_path)
        ):
            checkpoint = CompressedCheckpointIO().load_checkpoint(checkpoint_path)
        else:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        starts = self.sparsity.starts_from_weights or not {"loops", "optimizer_states", "epoch"} & checkpoint.keys()
        if not self._is_fitting or not starts or KEY in checkpoint:
            return checkpoint
        rank_zero_info("The checkpoint has no masks: its weights are where this training begins, with epoch 0.")
        left_out = ("loops", "callbacks")
        kept = {key: value for key, value in checkpoint.items() if key not in left_out}
        return kept | {"optimizer_states": [], "lr_schedulers": []}

    @property
    def _is_fitting(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.fn == TrainerFn.FITTING

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and the masks if they are to be trained."""
        super().load_model_state_dict(checkpoint, strict)
        if self.sparsity is None:
            return
        self._loaded = checkpoint.get(KEY, {})
        if self._is_masked:
            self._take_loaded()

    def _take_loaded(self) -> None:
        loaded, self._loaded = self._loaded, None
        if self._training is None or self.sparsity is None or loaded is None:
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
        self._apply_masks()

    def _apply_masks(self) -> None:
        if self._training is not None:
            self._training.apply()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write the masks too; what callbacks have put in place of the weights gets its zeros here."""
        self._add_masks(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _add_masks(self, checkpoint: dict[str, Any]) -> None:
        training, module = self._training, self.lightning_module
        if training is not None and self.sparsity is not None and module is not None:
            named = _parameters_of(module)
            if all(named.get(name) is parameter for name, parameter in training.parameters.items()):
                checkpoint[KEY] = training.state_dict() | settings_of(self.sparsity, training.parameters)
                checkpoint["state_dict"] = training.masked_state_dict(checkpoint["state_dict"])

    # ------------------------------------------------------------------ the end

    def on_train_end(self) -> None:
        """Cut what callbacks have put in place of the weights; and write the compressed file, if there is to be one."""
        super().on_train_end()
        self._apply_masks()
        if isinstance(self._training, CompressingTraining):
            assert self.lightning_module is not None
            if self.is_global_zero:
                self.compression_report = write_compressed(self.lightning_module, self._training)
            self.barrier("compressed")  # the file is there for every rank

    def _hold_whole_masks(self) -> None:
        """Before the module is whole again."""
        if self._training is not None:
            self._training.hold(None)

    def teardown(self) -> None:
        """Leave the optimizers alone; the masks stay, for a fit that goes on."""
        if self._training is not None:
            self._training.detach()
        self._is_masked = False
        super().teardown()


class SplitParts(Parts):
    """Weights of which ranks hold parts.

    Args:
        parameter: One of them.

    """

    def __init__(self, parameter: SplitParameter) -> None:
        self._parameter = parameter

    def take(self, parameter: Parameter, whole: Tensor) -> Tensor:
        """This rank's part."""
        return take_part(whole, parameter._spec) if isinstance(parameter, SplitParameter) else whole

    def gather(self, parameter: Parameter, part: Tensor) -> Tensor:
        """All ranks' parts."""
        return gather_part(part, parameter._spec) if isinstance(parameter, SplitParameter) else part

    def norms(self, norms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Those of all ranks' parts; of what isn't split, as many times that of one, before and after alike."""
        if not norms:
            return norms
        how: dict[str, Any] = {"dtype": torch.float64, "device": self._parameter.device}
        squares = torch.stack([torch.as_tensor(0.0 if norm is None else norm, **how) for norm in norms]).square_()
        for axis in self._parameter._spec.axes:
            axis.columns.sum_(squares)
        return list(squares.sqrt())

    def locally(self) -> AbstractContextManager[None]:
        """Within, tensors are what this rank holds."""
        return local_view()


def _parameters_of(module: Module) -> dict[str, Parameter]:
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours)


def _from_first(tensor: Tensor) -> None:
    dist.broadcast(tensor, src=0)
