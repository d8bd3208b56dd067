"""Steps of a module that is split over ranks: what they return is whole, and what crossed is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import set_checkpoint_early_stop

from ._placing import num_images
from .placement.columns import Columns, Crossing
from .placement.layout import Layout
from .placement.rules.norms import synchronize_buffers
from .placement.tensor import no_dispatch, whole


class SplitSteps(DDPStrategy):
    """Steps over a module that the ranks of a replica hold between them.

    Args:
        *args: Passed on.
        **options: Passed on.

    """

    num_columns: int
    _columns: Columns

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layout: Layout | None = None
        self._last_crossings: list[Crossing] = []
        self._in_training_step = False

    @property
    def _is_split(self) -> bool:
        """Whether the ranks hold the module between them at present."""
        return True

    @property
    def crossings(self) -> list[Crossing]:
        """What each crossing of the last training step sent per image, forward and backward."""
        return self._columns.ledger.crossings if self._in_training_step else self._last_crossings

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step, and log what crossed."""
        if not self._is_split:
            return super().training_step(*args, **kwargs)
        self._start_step(args, training=True)
        output = self._run_whole(super().training_step, *args, **kwargs)
        self._log_crossings()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step; what it returns is whole."""
        if not self._is_split:
            return super().validation_step(*args, **kwargs)
        self._start_step(args, training=False)
        return self._run_whole(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step; what it returns is whole."""
        if not self._is_split:
            return super().test_step(*args, **kwargs)
        self._start_step(args, training=False)
        return self._run_whole(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; what it returns is whole."""
        if not self._is_split:
            return super().predict_step(*args, **kwargs)
        self._start_step(args, training=False)
        return self._run_whole(super().predict_step, *args, **kwargs)

    def _start_step(self, args: tuple[Any, ...], training: bool) -> None:
        if self._in_training_step:
            self._last_crossings = self._columns.ledger.crossings
        self._in_training_step = training
        self._columns.ledger.start_step(num_images(args[0]) if args else 1)

    def _run_whole(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with set_checkpoint_early_stop(False):  # or a rank that needs no fringe recomputes less than its neighbours
            output = step(*args, **kwargs)
        synchronize_buffers()
        with no_dispatch():
            complete: STEP_OUTPUT = tree_map(lambda value: whole(value, "step output"), output)
            return complete

    def _log_crossings(self) -> None:
        module = self.lightning_module
        assert module is not None
        if self.num_columns == 1 or module._trainer is None:
            return
        now = self._columns.ledger.crossings
        past = {crossing.name: crossing for crossing in self._last_crossings}
        values = {f"crossings/{crossing.name or 'module'}": crossing.floats_per_image_forward for crossing in now}
        values["crossings/forward_floats"] = sum(crossing.floats_per_image_forward for crossing in now)
        values["crossings/backward_floats"] = sum(crossing.floats_per_image_backward for crossing in past.values())
        values["crossings/bytes"] = sum(crossing.bytes_per_image_forward for crossing in now) + sum(
            crossing.bytes_per_image_backward for crossing in past.values()
        )
        # The last finished backward pass is that of the step before: nothing to log on the first step of all.
        if not past:
            del values["crossings/backward_floats"], values["crossings/bytes"]
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
