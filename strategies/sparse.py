"""Fewer weights: train with a mask over each layer, which an algorithm moves."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS

from ._masked import MaskedStrategy
from .launching import DDPStrategy
from .sparsity import SparseAlgorithm, SparseMomentum
from .sparsity.computing import SparseComputation


class SparseStrategy(MaskedStrategy):
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
        super().__init__(sparsity=SparseMomentum() if sparsity is None else sparsity, **options)
        if compute not in ("dense", "sparse"):
            raise MisconfigurationException(f"compute={compute!r} must be 'dense' or 'sparse'.")
        self.inner = inner
        self.compute = compute
        self._computation: SparseComputation | None = None

    def setup(self, trainer: Trainer) -> None:
        """Set up as usual, masks included; then have layers compute with live weights alone, if they are to."""
        super().setup(trainer)
        training = self._training
        if self.compute == "sparse" and training is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self.lightning_module is not None
            self._computation = SparseComputation(self.lightning_module, lambda: training.masks, training.wants_dense)
            self._computation.install(training.parameters)

    def teardown(self) -> None:
        """Leave the optimizers and the layers alone; the masks stay, for a fit that goes on."""
        super().teardown()
        if self._computation is not None:
            self._computation.remove()
            self._computation = None


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
