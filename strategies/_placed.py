"""A module that is split over the ranks of each replica, in whatever way: its checkpoints, its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device, _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from ._leases import seeded
from ._masked import MaskedStrategy
from ._mesh import MeshStrategy
from ._placing import INTERRUPTED, batch_size_of, log_graph, refuse_interrupted, run_eagerly
from ._split_steps import SplitSteps
from .placement.batches import BatchSource
from .placement.choosing import choose_whole, flops_per_example
from .placement.layout import COLUMNS, MEASURED, Layout, read_layout
from .placement.module import unplace, whole_state_dict
from .placement.optimizers import gather_optimizer_state, take_optimizer_state, whole_optimizer_state, wrap_step
from .placement.speeds import measure_speeds


class PlacedStrategy(SplitSteps, MaskedStrategy, MeshStrategy):
    """Ranks that hold one module between them, and say what crosses.

    Args:
        num_columns: Ranks of one replica.
        data_parallel_size: Number of replicas.
        batches: ``"auto"`` or ``"broadcast"``.
        layout: Where layers are to live elsewhere than they would, or ``"measured"``.
        **options: ``sparsity`` as of ``MaskedStrategy``; the rest is passed on to Lightning.

    """

    def __init__(
        self,
        num_columns: int,
        data_parallel_size: int,
        batches: BatchSource,
        layout: str | Path | Mapping[str, str] | Layout,
        **options: Any,
    ) -> None:
        super().__init__(num_columns, data_parallel_size, batches, **options)
        self._overrides = dict(read_layout(layout, self._split))
        self._is_measured = layout == MEASURED
        self._stance: Any = None  # of torch.compile, while the module is split

    _split = COLUMNS  # what a layer is in that is not whole

    # ------------------------------------------------------------------ the module

    def setup(self, trainer: Trainer) -> None:
        """Place the module, then let the optimizers see what this rank holds."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        refuse_interrupted(self.lightning_module)
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync and self.data_parallel_size > 1:
            self.model = self._layer_sync.apply(self.lightning_module)
        self.precision_plugin.convert_module(self.lightning_module)
        self.model_to_device()
        self._broadcast_module(self.lightning_module)
        if self.num_columns > 1 and self._stance is None:
            self._stance = run_eagerly(self.lightning_module)
        log_graph(self.lightning_module, trainer.loggers)
        self.layout = self._place(self.lightning_module)
        self._adopt_metrics(self.lightning_module)
        if fitting:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                wrap_step(optimizer, self.reduce if self.data_parallel_size > 1 else None)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
        self._mask(trainer)

    @property
    def _num_counted(self) -> int:
        """What the ranks of a replica have in common counts once."""
        return self.data_parallel_size

    def _derive(
        self, module: LightningModule, derive: Callable[[LightningModule, Any, Mapping[str, str]], Layout]
    ) -> Layout | None:
        """What ``derive`` makes of the module's example input, if it has one that its forward can take."""
        example = module.example_input_array
        trainer = module._trainer
        assert trainer is not None
        chooses = self._is_measured and self.num_columns > 1 and trainer.state.fn == TrainerFn.FITTING
        num_examples = batch_size_of(trainer) if chooses else None
        if chooses and (example is None or num_examples is None):
            missing = "example_input_array" if example is None else "batch_size"
            raise MisconfigurationException(
                f"layout='measured' needs to know what a step is: set self.{missing} in the module"
                f"{'' if example is None else ', or give fit a DataLoader that has one'}. Or use layout='auto'."
            )
        if example is None or self.num_columns == 1:
            return None
        module._trainer = None  # no part of what is copied
        try:
            with seeded(0):  # what a forward draws here, training would draw otherwise than on one device
                example = self.precision_plugin.convert_input(example)
                if num_examples is None:
                    return derive(module, example, self._overrides)
                return self._choose(partial(derive, module, example), flops_per_example(module, example), num_examples)
        except MisconfigurationException:
            raise
        except Exception as error:  # an example that forward can't take must not stop a run that doesn't need it
            if num_examples is not None:
                raise MisconfigurationException(
                    "layout='measured' needs an example_input_array that forward can take:"
                    f" {error} Or use layout='auto'."
                ) from error
            rank_zero_info(f"example_input_array was not used to derive the layout: {error}")
            return None
        finally:
            module._trainer = trainer

    def _choose(
        self, derive: Callable[[Mapping[str, str]], Layout], flops: Mapping[str, int], num_examples: int
    ) -> Layout:
        assert self.lightning_module is not None
        dtype = next((p.dtype for p in self.lightning_module.parameters() if p.is_floating_point()), torch.float32)
        speeds = measure_speeds(self._columns, self.root_device, dtype)
        # Replicas must do alike, though one may be on a slower host: gradients of one shape are averaged.
        speeds, num_examples = self.broadcast((speeds, num_examples))
        layout = choose_whole(derive, flops, num_examples, speeds, dtype.itemsize)
        rank_zero_info(f"Where each layer lives, at {num_examples:,} examples a step and {speeds}:\n{layout}")
        return layout

    @abstractmethod
    def _place(self, module: LightningModule) -> Layout:
        """Split the module over the ranks, in place."""

    # ------------------------------------------------------------------ optimizers and checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer state that one device would hold."""
        return whole_optimizer_state(optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of whole states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(take_optimizer_state(optimizer, state))
            _optimizer_to_device(optimizer, self.root_device)
        self._apply_masks()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict that one device would hold."""
        assert self.lightning_module is not None
        return whole_state_dict(self.lightning_module)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Nobody answers any more: keep teardown from asking, and hang up, so that those who wait hear of it."""
        self._columns.close(INTERRUPTED)
        self._release()
        self.device_mesh = None
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give the module back whole, as it came."""
        if self.lightning_module is not None and not self._columns.closed:
            for optimizer in self.optimizers:
                gather_optimizer_state(optimizer)
            self._hold_whole_masks()
            unplace(self.lightning_module)
        self._release()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        super().teardown()
