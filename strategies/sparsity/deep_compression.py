"""Deep Compression (Han et al. 2016): prune in rounds, share weights, train the shared values; phases of one fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms import SparseAlgorithm, Update
from .arguments import is_number, is_whole
from .coding.streams import CODERS, Coder
from .layers import Layer, largest, layer_name, num_kept
from .parts import Parts
from .patterns import settings_of
from .phases import Phase, check_length, plan_phases
from .sharing import MAX_BITS

ByLayer = Mapping[str, Any]


class DeepCompression(SparseAlgorithm):
    """Prune, retrain, share, train the shared values, and write one small file, in a stock fit.

    Phases follow each other, and begin with epochs. First all weights are trained. Then come rounds of pruning, after
    each of which the weights that are left are retrained, with as much less dropout as there are fewer of them: dropout
    ``D_r = D_o sqrt(C_r / C_o)``. A layer keeps the same share of its weights in each round, so that the last one
    arrives at `density`. At last the weights of a layer share ``2 ** bits`` values, by k-means that begins linearly;
    which weight has which value stays as it is, and the values are trained, by any optimizer: the gradient of each is
    the sum of those of its weights. When the training ends, the compressed file is written.

    A checkpoint of a dense training (``Trainer.fit(ckpt_path="dense.ckpt")``) gives its weights and nothing else:
    epochs count from 0, optimizer and schedule are new, and there is no first phase. A checkpoint of this training goes
    on as if it had not been interrupted.

    What is left of the training's epochs goes to the first phase if `train` is None and weights are new, and otherwise
    to the last round of retraining.

    The rate of a step is that of the user's optimizer and schedule times a factor of the phase. The paper's retraining
    has 1/10 (LeNets) or 1/100 (AlexNet) of the first rate; a schedule that falls over the whole training does that
    already, and goes with factors of 1. Shared values have a further factor of their own: a sum over many weights has a
    large gradient and a large curvature. The inverse of the number of weights a value makes the sum a mean. Optimizers
    that divide by the size of gradients (Adam and its kin) want 1.

    Args:
        density: Share of a layer's weights to keep, above 0 and at most 1: a number for all layers, or numbers by name
            or pattern (``{"*": 0.1, "conv*": 0.4, "fc8": None}``; the last that fits counts). A layer that has none
            isn't pruned.
        bits: Of the number of a shared value, 1 to 16, in the same way. A layer that has none isn't shared; None: the
            training ends with retraining.
        sensitivity: Instead of a density: drop what is smaller than this many standard deviations of the layer's live
            weights, in each round; as many weights as shared values stay. Goes before `density`.
        train: Epochs, or a part of the training, before anything is pruned; None: what the others leave.
        retrain: Epochs, or a part of the training, of all rounds of pruning and retraining together.
        share: Epochs, or a part of the training, in which shared values are trained.
        num_rounds: Of pruning.
        retrain_lr: Factor of the learning rate after pruning.
        share_lr: Factor of the learning rate of all that is trained beside shared values.
        centroid_lr: A further factor of shared values; None: 1 where the optimizer divides by the size of gradients,
            and else 1 / (weights a value), of each layer.
        dropout: Whether to correct it.
        dirpath: Where the file goes; None: ``Trainer(default_root_dir=...)``.
        filename: Its name; None: none is written.
        coder: Of the file: "ans", or "huffman" as in the paper.

    Raises:
        ValueError: An argument is out of range. Before the first batch: a pattern that fits no layer, phases that are
            longer than the training, a layer with more shared values than weights.

    Metrics: ``compression/phase`` (0 training, 1 pruning, 2 sharing), ``compression/round``,
    ``compression/lr_factor``, ``density/<layer>``, and at the end ``compression/rate`` and
    ``compression/file_bytes``.

    Example:
        >>> DeepCompression(density={"*": 0.1, "conv*": 0.4}, bits={"*": 5, "conv*": 8}, num_rounds=2)
        DeepCompression(density={'*': 0.1, 'conv*': 0.4}, bits={'*': 5, 'conv*': 8}, num_rounds=2)

    """

    starts_from_weights = True

    def __init__(
        self,
        density: float | ByLayer | None = 0.1,
        bits: int | ByLayer | None = 5,
        sensitivity: float | ByLayer | None = None,
        train: float | None = None,
        retrain: float = 0.5,
        share: float = 0.2,
        num_rounds: int = 3,
        retrain_lr: float = 0.1,
        share_lr: float = 0.1,
        centroid_lr: float | None = None,
        dropout: bool = True,
        dirpath: str | None = None,
        filename: str | None = "compressed.safetensors",
        coder: Coder = "ans",
    ) -> None:
        super().__init__(1.0)
        self.densities, self.bits = _by_layer(density), _by_layer(bits)
        self.sensitivities = _by_layer(sensitivity)
        for name, value in self.densities.items():
            if value is not None and not (is_number(value) and 0.0 < value <= 1.0):
                raise ValueError(f"density={value!r} of {name!r} must be above 0 and at most 1: 0.09 keeps 9 %.")
        for name, value in self.bits.items():
            if value is not None and not (is_whole(value) and 1 <= value <= MAX_BITS):
                raise ValueError(f"bits={value!r} of {name!r} must be a whole number from 1 to {MAX_BITS}.")
        for name, value in self.sensitivities.items():
            if value is not None and not (is_number(value) and value > 0.0):
                raise ValueError(f"sensitivity={value!r} of {name!r} must be above 0, or null.")
        if not is_whole(num_rounds) or num_rounds < 1:
            raise ValueError(f"num_rounds={num_rounds!r} must be 1 or more.")
        check_length("train", train, 0)
        check_length("retrain", _given("retrain", retrain), num_rounds)
        check_length("share", _given("share", share), 1)
        factors = {"retrain_lr": retrain_lr, "share_lr": share_lr, "centroid_lr": centroid_lr}
        for name, value in factors.items():
            if not (value is None and name == "centroid_lr") and not (is_number(value) and value >= 0.0):  # type: ignore[operator]
                raise ValueError(f"{name}={value!r} must be a factor of the learning rate, 0 or more.")
        if coder not in CODERS:
            raise ValueError(f"coder={coder!r} must be one of {', '.join(CODERS)}.")
        self.train, self.retrain, self.share, self.num_rounds = train, retrain, share, num_rounds
        self.retrain_lr, self.share_lr, self.centroid_lr = retrain_lr, share_lr, centroid_lr
        self.dropout, self.dirpath, self.filename, self.coder = dropout, dirpath, filename, coder

    @property
    def density_asked(self) -> Any:
        """What decides how many weights are left in the end."""
        return {
            "density": {name: _plain(value) for name, value in self.densities.items()},
            "sensitivity": {name: _plain(value) for name, value in self.sensitivities.items()},
        }

    def __repr__(self) -> str:
        return f"DeepCompression(density={self.densities}, bits={self.bits}, num_rounds={self.num_rounds})"

    def new_training(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        share: Callable[[Tensor], object] | None,
        progress: Callable[[], float],
        parts: Parts | None = None,
    ) -> Any:
        """Have masks that shrink, and weights that share values."""
        from .compressing import CompressingTraining

        if parts is not None:
            raise ValueError(
                "DeepCompression lets the weights of a whole layer share values, and here ranks hold parts of it."
                " Train with squall.SparseStrategy(DeepCompression(...), inner='ddp')."
            )
        return CompressingTraining(self, parameters, seed, share, progress, module)

    def plan(self, num_epochs: int, trained: bool) -> list[Phase]:
        """Lay out the phases of a training.

        Args:
            num_epochs: Of the training.
            trained: Whether its weights come from another one.

        """
        share = self.share if self.bits else 0
        return plan_phases(num_epochs, self.train, self.retrain, share, self.num_rounds, trained)

    def lr_factor(self, phase: Phase) -> float:
        """The factor of the user's learning rate.

        Args:
            phase: One of the plan.

        """
        return {"train": 1.0, "prune": self.retrain_lr, "share": self.share_lr}[phase.name]

    def settle(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, LayerPlan]:
        """Say what is to become of each layer.

        Args:
            parameters: Weights that can be pruned, by name.

        Returns:
            By the name of the weight.

        Raises:
            ValueError: A pattern fits no layer, or a layer is to have more values than weights.

        """
        names = [layer_name(name) for name in parameters]
        densities = settings_of(names, self.densities, "density")
        sensitivities = settings_of(names, self.sensitivities, "sensitivity")
        bits = settings_of(names, self.bits, "bits")
        plans = {}
        for name, parameter in parameters.items():
            layer = layer_name(name)
            sensitivity = sensitivities.get(layer)
            density = None if sensitivity is not None else densities.get(layer)
            plan = plans[name] = LayerPlan(density, sensitivity, bits.get(layer))
            if plan.bits is not None and parameter.is_complex():
                raise ValueError(
                    f"bits={plan.bits}: {layer} has complex weights, which can't be shared: give it none,"
                    f" bits={{'*': {plan.bits}, '{layer}': None}}."
                )
            num_left = parameter.numel() if density is None else num_kept(density, parameter.numel())
            if plan.num_values > num_left:
                raise ValueError(
                    f"bits={plan.bits} makes {plan.num_values:,} shared values of the {num_left:,} weights that"
                    f" {layer} keeps: give it fewer bits, bits={{'{layer}': {max(num_left.bit_length() - 1, 1)}}}, or"
                    " more weights."
                )
        return plans

    def first_masks(
        self, weights: Mapping[str, Tensor], generator: torch.Generator, trained: bool
    ) -> dict[str, Tensor]:
        """All weights live."""
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    def is_due(self, num_steps: int, end_of_epoch: bool, progress: float) -> bool:
        """Never: phases have epochs of their own."""
        return False

    def update(self, layers: Sequence[Layer], num_steps: int, progress: float) -> Update:
        """Nothing: see :meth:`LayerPlan.shrink`."""
        return Update()


class LayerPlan:
    """What is to become of a layer.

    Args:
        density: Share of its weights to keep.
        sensitivity: Or standard deviations below which weights go.
        bits: Of a shared value's number.

    """

    def __init__(self, density: float | None, sensitivity: float | None, bits: int | None) -> None:
        self.density, self.sensitivity, self.bits = density, sensitivity, bits

    @property
    def num_values(self) -> int:
        """How many values its weights are to share; 1 if they aren't."""
        return 1 if self.bits is None else 1 << self.bits

    def shrink(self, weight: Tensor, mask: Tensor, part: float) -> Tensor:
        """Let fewer weights live.

        Args:
            weight: The layer's.
            mask: Which of them live.
            part: Of the rounds that are done with this one.

        Returns:
            A part of the mask.

        """
        if self.sensitivity is not None:
            values = weight[mask].double()
            among = mask & (weight.abs() > self.sensitivity * float(values.std(correction=0)))
            least = min(self.num_values, len(values))
            return among if int(among.sum()) >= least else largest(weight.abs(), mask, least)
        if self.density is None:
            return mask
        num_left = min(num_kept(self.density**part, mask.numel()), int(mask.sum()))
        return largest(weight.abs(), mask, num_left)


def _by_layer(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"*": value}


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)


def _given(argument: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"{argument} must be a number of epochs, or a part of the training.")
    return value
