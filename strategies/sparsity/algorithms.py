"""Sparse from the first step to the last: sparse momentum, RigL, SET, and a mask that stays as it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .arguments import is_number, is_whole
from .functions import Grow, Prune, Redistribute, grows, momentum_shares, prunes, redistributions
from .initialisation import INITIALISATIONS, magnitude_masks, random_masks
from .layers import Layer
from .parts import Parts
from .rates import NEED_PROGRESS, RATES
from .registry import signals_of

if TYPE_CHECKING:
    from .training import MaskedTraining


@dataclass(frozen=True)
class Update:
    """What an update of the masks did.

    Args:
        prune_rate: The part of the live weights that it was to take.
        num_pruned: Weights that it took.
        num_grown: Weights that it gave.

    """

    prune_rate: float = 0.0
    num_pruned: int = 0
    num_grown: int = 0


class SparseAlgorithm(ABC):
    """Decides which weights exist. It has no state: that is the masks', and belongs to who owns them.

    Args:
        density: Live weights over all, in the layers that are sparse.
        dense: Names or patterns of layers to leave whole; None for none.
        seed: Of the masks and of random growth; None for the first rank's.

    Raises:
        ValueError: The density is not in (0, 1].

    """

    def __init__(self, density: float, dense: Sequence[str] | None = (), seed: int | None = None) -> None:
        if not (is_number(density) and 0.0 < density <= 1.0):
            raise ValueError(f"density={density!r} must be above 0 and at most 1: 0.05 keeps one weight in twenty.")
        self.density = float(density)
        self.dense = () if dense is None else dense
        self.seed = seed

    @property
    def density_asked(self) -> Any:
        """The density as the user gave it, which a training that goes on has to have too."""
        return self.density

    reads: frozenset[str] = frozenset()
    """What the algorithm reads of dead weights: "momentum", "gradient"."""
    dense_every: int = 1
    """An algorithm that reads the momentum gets the gradients of dead weights in every so many steps."""
    needs_progress: bool = False
    """Whether it has to know how much of the training is done."""
    starts_from_weights: bool = False
    """Whether a checkpoint of a dense training gives its weights alone, and epochs count from 0."""

    def new_training(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        share: Callable[[Tensor], object] | None,
        progress: Callable[[], float],
        parts: Parts | None = None,
    ) -> MaskedTraining:
        """Make what owns the masks of a training.

        Args:
            module: What is trained.
            parameters: Its weights that can be sparse, by name.
            seed: Of the masks and of random growth; equal on all ranks.
            share: Makes a tensor what it is on the first rank, in place; None if there is one rank.
            progress: Tells the part of the training that is done.
            parts: What this rank holds of each weight; None for all of it.

        """
        from .training import MaskedTraining

        return MaskedTraining(self, parameters, seed, share, progress, parts)

    @abstractmethod
    def first_masks(
        self, weights: Mapping[str, Tensor], generator: torch.Generator, trained: bool
    ) -> dict[str, Tensor]:
        """Say which weights live at the start.

        Args:
            weights: By name.
            generator: For random numbers.
            trained: Whether the weights come from a training without masks.

        Returns:
            Masks of the layers that aren't dense.

        """

    @abstractmethod
    def is_due(self, num_steps: int, end_of_epoch: bool, progress: float) -> bool:
        """Say whether the masks move now.

        Args:
            num_steps: Optimizer steps that are done.
            end_of_epoch: Whether an epoch has just ended, and another follows; otherwise a step has.
            progress: Part of the training that is done.

        """

    @abstractmethod
    def update(self, layers: Sequence[Layer], num_steps: int, progress: float) -> Update:
        """Move the masks; the new ones take the place of ``layer.mask``.

        Args:
            layers: All that aren't dense.
            num_steps: Optimizer steps that are done.
            progress: Part of the training that is done.

        """


class DynamicSparsity(SparseAlgorithm):
    """Prune, redistribute and grow at fixed distances, so that the number of live weights stays what it was.

    Args:
        density: Live weights over all, in the layers that are sparse.
        prune: Which weights go: a name ("magnitude", "sign_magnitude"), ``"package.module.function"``, or a function.
        redistribute: How many come to which layer: "none", "momentum", "magnitude", "nonzeros", or as above.
        grow: Which come: "random", "momentum", "gradient", or as above.
        prune_rate: The part of a layer's live weights that goes at first.
        prune_rate_end: And in the end.
        schedule: How it gets there: "cosine", "linear", "constant", or "exponential".
        update_every: "epoch", or a number of optimizer steps.
        stop: After this part of the training the masks stay.
        init: Density of each layer at first: "uniform", or "erk".
        dense: Names or patterns of layers to leave whole; one that matches nothing is an error.
        seed: Of the masks and of random growth; None for that of the first rank's generator.

    Raises:
        ValueError: An argument is out of range, or names nothing.

    Example:
        >>> algorithm = DynamicSparsity(0.1, prune="magnitude", redistribute="none", grow="random")
        >>> layer = Layer("fc.weight", torch.arange(4.0), torch.tensor([False, True, True, False]))
        >>> algorithm.update([layer], num_steps=10, progress=0.5)
        Update(prune_rate=0.25, num_pruned=1, num_grown=1)
        >>> layer.num_live
        2

    """

    def __init__(
        self,
        density: float = 0.05,
        prune: str | Prune = "magnitude",
        redistribute: str | Redistribute = "none",
        grow: str | Grow = "random",
        prune_rate: float = 0.5,
        prune_rate_end: float = 0.0,
        schedule: str = "cosine",
        update_every: int | Literal["epoch"] = "epoch",
        stop: float = 1.0,
        init: str = "uniform",
        dense: Sequence[str] | None = (),
        seed: int | None = None,
    ) -> None:
        super().__init__(density, dense, seed)
        for name, value in (("prune_rate", prune_rate), ("prune_rate_end", prune_rate_end), ("stop", stop)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r} must be from 0 to 1.")
        if schedule not in RATES:
            raise ValueError(f"schedule={schedule!r} is none of {', '.join(RATES)}.")
        if init not in INITIALISATIONS:
            raise ValueError(f"init={init!r} is none of {', '.join(INITIALISATIONS)}.")
        if update_every != "epoch" and not (is_whole(update_every) and update_every > 0):
            raise ValueError(f"update_every={update_every!r} must be 'epoch' or a number of steps, 1 or more.")
        self.prune = prunes.find(prune)
        self.redistribute = redistributions.find(redistribute)
        self.grow = grows.find(grow)
        self.reads = signals_of(self.prune, self.redistribute, self.grow)
        if update_every == "epoch" and "gradient" in self.reads:
            raise ValueError("update_every='epoch': between epochs is no gradient to read. Give a number of steps.")
        self.prune_rate, self.prune_rate_end, self.schedule = prune_rate, prune_rate_end, schedule
        self.update_every: int | Literal["epoch"] = "epoch" if update_every == "epoch" else int(update_every)
        self.stop, self.init = stop, init
        self.needs_progress = schedule in NEED_PROGRESS or stop < 1.0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(density={self.density:g}, init={self.init!r}, update_every={self.update_every!r})"
        )

    def first_masks(
        self, weights: Mapping[str, Tensor], generator: torch.Generator, trained: bool
    ) -> dict[str, Tensor]:
        """At random; but what was trained without masks keeps its largest weights."""
        densities = INITIALISATIONS[self.init]({name: tuple(w.shape) for name, w in weights.items()}, self.density)
        return magnitude_masks(weights, densities) if trained else random_masks(weights, densities, generator)

    def is_due(self, num_steps: int, end_of_epoch: bool, progress: float) -> bool:
        """Between epochs, or every so many steps; not after ``stop``."""
        if progress >= self.stop:
            return False
        if isinstance(self.update_every, int):
            return not end_of_epoch and num_steps > 0 and num_steps % self.update_every == 0
        return end_of_epoch

    def rate(self, num_steps: int, progress: float) -> float:
        """The part of the live weights that an update takes now.

        Args:
            num_steps: Optimizer steps that are done.
            progress: Part of the training that is done.

        """
        done = progress / self.stop if self.stop else 1.0
        return RATES[self.schedule](self.prune_rate, self.prune_rate_end, done, num_steps)

    def num_to_prune(self, layers: Sequence[Layer], rate: float) -> list[int]:
        """How many weights each layer loses; its last one stays.

        Args:
            layers: All that aren't dense.
            rate: As of :meth:`rate`.

        """
        return [_num_to_prune(layer, rate) for layer in layers]

    def update(self, layers: Sequence[Layer], num_steps: int, progress: float) -> Update:
        """Prune, redistribute, grow; exactly as many weights live afterwards."""
        rate = self.rate(num_steps, progress)
        losses = self.num_to_prune(layers, rate)
        gains = self.redistribute(layers, losses)
        if len(gains) != len(losses) or sum(gains) != sum(losses):
            raise ValueError(
                f"redistribute={self.redistribute.__name__} was to deal out {sum(losses)} weights to {len(losses)}"
                f" layers, and returned {list(gains)}."
            )
        num_grown = 0
        for layer, num_lost, num_gained in zip(layers, losses, gains, strict=True):
            before = layer.mask
            layer.mask = _checked("prune", self.prune, layer, num_lost, -1)
            layer.mask = _checked("grow", self.grow, layer, num_gained, +1)
            num_grown += int((layer.mask & ~before).sum())
        return Update(rate, sum(losses), num_grown)


def _num_to_prune(layer: Layer, rate: float) -> int:
    num_live = layer.num_live
    return max(0, min(math.ceil(rate * num_live), num_live - 1))


def _checked(kind: str, function: Any, layer: Layer, num: int, sign: int) -> Tensor:
    """Call a user's or our own function, and hold it to its numbers: an error here would be silent for hours."""
    before = layer.mask
    mask: Tensor = function(layer, num)
    fits = mask.dtype == torch.bool and mask.shape == before.shape
    if not fits or int((before & ~mask if sign < 0 else mask & ~before).sum()) != num:
        raise ValueError(f"{kind}={function.__name__} was to {kind} {num} of {layer.name}'s weights, and did not.")
    if int(mask.sum()) != layer.num_live + sign * num:
        raise ValueError(f"{kind}={function.__name__} has done more to {layer.name} than to {kind} {num} weights.")
    return mask


class SparseMomentum(DynamicSparsity):
    """Sparse momentum (Dettmers and Zettlemoyer 2019, algorithm 1): weights move to where the momentum is.

    Between epochs each layer loses the part ``prune_rate`` of its live weights, those of smallest magnitude. All that
    were lost are dealt out to the layers by the mean magnitude of their live weights' momentum, and in each layer the
    dead weights with the largest momentum come to life, at 0. The optimizer therefore keeps the momentum of dead
    weights too: ``momentum_buffer`` of SGD, ``exp_avg / sqrt(exp_avg_sq)`` of Adam and its kin. For an optimizer
    without momentum, one is kept beside it.

    Details are those of the authors' code: a layer that is denser than 80 % and has more than its share of the momentum
    is pruned by its sparsity at most; layers are filled to 99 % at most, and what is too much goes to the others.
    Unlike there, the total is exact at each update, so that nothing has to be adjusted later; and a weight that is
    pruned and grown in one update was never gone.

    Args:
        density: Live weights over all, in the layers that are sparse.
        prune_rate: The part of a layer's live weights that goes at first.
        prune_rate_end: And in the end.
        schedule: "cosine", "linear", "constant", or "exponential", which the authors' code calls linear.
        update_every: "epoch", or a number of optimizer steps.
        stop: After this part of the training the masks stay.
        init: Density of each layer at first: "uniform" (the authors'), or "erk".
        dense: Names or patterns of layers to leave whole; one that matches nothing is an error.
        seed: Of the first masks; None for that of the first rank's generator.
        dense_every: Gradients of dead weights are computed in every so many steps; 1 as published. In the others the
            momentum of dead weights decays, and ``SparseStrategy(compute="sparse")`` has no dense pass to make.

    Raises:
        ValueError: An argument is out of range, or names nothing.

    Example:
        >>> SparseMomentum(density=0.05)
        SparseMomentum(density=0.05, init='uniform', update_every='epoch')

    """

    def __init__(
        self,
        density: float = 0.05,
        prune_rate: float = 0.5,
        prune_rate_end: float = 0.005,
        schedule: str = "cosine",
        update_every: int | Literal["epoch"] = "epoch",
        stop: float = 1.0,
        init: str = "uniform",
        dense: Sequence[str] | None = (),
        seed: int | None = None,
        dense_every: int = 1,
    ) -> None:
        if isinstance(dense_every, bool) or not isinstance(dense_every, int) or dense_every < 1:
            raise ValueError(f"dense_every={dense_every!r} must be a number of steps, 1 or more.")
        self.dense_every = dense_every
        super().__init__(
            density, "magnitude", "momentum", "momentum", prune_rate, prune_rate_end, schedule, update_every, stop,
            init, dense, seed,
        )  # fmt: skip

    def num_to_prune(self, layers: Sequence[Layer], rate: float) -> list[int]:
        """As everywhere, but a nearly full layer that is to grow is pruned by its sparsity at most."""
        numbers = []
        for layer, share in zip(layers, momentum_shares(layers), strict=True):
            sparsity = 1.0 - layer.density
            crowded = sparsity < 0.2 and share > 1.0 / len(layers)
            numbers.append(_num_to_prune(layer, min(sparsity, rate) if crowded else rate))
        return numbers


class RigL(DynamicSparsity):
    """RigL (Evci et al. 2020): the smallest weights go, those with the largest gradient come, each layer by itself.

    Args:
        density: Live weights over all, in the layers that are sparse.
        prune_rate: The paper's alpha: the part of a layer's live weights that goes at first; it falls to 0 at ``stop``.
        schedule: How it falls.
        update_every: The paper's delta T: optimizer steps between updates.
        stop: The paper's T_end, as a part of the training.
        init: "erk", or "uniform".
        dense: Names or patterns of layers to leave whole; one that matches nothing is an error.
        seed: Of the first masks; None for that of the first rank's generator.

    Raises:
        ValueError: An argument is out of range, or names nothing.

    Example:
        >>> RigL(density=0.1).update_every
        100

    """

    def __init__(
        self,
        density: float = 0.05,
        prune_rate: float = 0.3,
        schedule: str = "cosine",
        update_every: int = 100,
        stop: float = 0.75,
        init: str = "erk",
        dense: Sequence[str] | None = (),
        seed: int | None = None,
    ) -> None:
        super().__init__(
            density, "magnitude", "none", "gradient", prune_rate, 0.0, schedule, update_every, stop, init, dense, seed
        )


class SET(DynamicSparsity):
    """Sparse evolutionary training (Mocanu et al. 2018): what is close to zero goes, and others come at random.

    Args:
        density: Live weights over all, in the layers that are sparse.
        prune_rate: The paper's zeta, which stays: the part of a layer's live weights that goes, of each sign alike.
        update_every: "epoch", or a number of optimizer steps.
        init: "erk" (Erdős-Rényi, the paper's), or "uniform".
        dense: Names or patterns of layers to leave whole; one that matches nothing is an error.
        seed: Of masks and growth; None for that of the first rank's generator.

    Raises:
        ValueError: An argument is out of range, or names nothing.

    Example:
        >>> SET(density=0.1).rate(num_steps=100, progress=0.9)
        0.3

    """

    def __init__(
        self,
        density: float = 0.05,
        prune_rate: float = 0.3,
        update_every: int | Literal["epoch"] = "epoch",
        init: str = "erk",
        dense: Sequence[str] | None = (),
        seed: int | None = None,
    ) -> None:
        super().__init__(
            density, "sign_magnitude", "none", "random", prune_rate, prune_rate, "constant", update_every, 1.0, init,
            dense, seed,
        )  # fmt: skip


class Static(DynamicSparsity):
    """A random mask that stays as it is: what the others are compared with.

    Args:
        density: Live weights over all, in the layers that are sparse.
        init: "uniform", or "erk".
        dense: Names or patterns of layers to leave whole; one that matches nothing is an error.
        seed: Of the masks; None for that of the first rank's generator.

    Raises:
        ValueError: An argument is out of range, or names nothing.

    Example:
        >>> Static(density=0.1).is_due(num_steps=100, end_of_epoch=True, progress=0.5)
        False

    """

    def __init__(
        self, density: float = 0.05, init: str = "uniform", dense: Sequence[str] | None = (), seed: int | None = None
    ) -> None:
        super().__init__(
            density, "magnitude", "none", "random", 0.0, 0.0, "constant", "epoch", init=init, dense=dense, seed=seed
        )

    def is_due(self, num_steps: int, end_of_epoch: bool, progress: float) -> bool:
        """Never."""
        return False
