"""L-BFGS over vectors that somebody else holds: what to compute next is yielded, scalars are sent back.

It takes the steps of :class:`torch.optim.LBFGS` with ``line_search_fn="strong_wolfe"`` (Nocedal and Wright 2006,
algorithms 7.4, 3.5 and 3.6), to rounding. What it has come to after an iteration is a :class:`Point`, from which it
can go on in another process: slots that a point names are not written before there is a next one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .operations import WEIGHTS, Combine, Evaluate, absolute_sum, dot, largest
from .wolfe import LineSearch, Trial

_LEAST_CURVATURE = 1e-10  # of a pair that is kept: below, the Hessian's inverse would not stay positive


@dataclass(frozen=True)
class LbfgsOptions:
    """Settings, with the names of torch's.

    Args:
        history_size: Pairs of steps and changes of the gradient that are kept, ``m``.
        lr: First step length that a line search tries; in the first iteration at most ``lr / |g|_1``.
        tolerance_grad: The end, when no element of the gradient is larger.
        tolerance_change: The end, when a step changes no weight or not the loss by more.
        max_line_search: Evaluations of one line search.
        max_iterations: The end; -1 for no limit.

    """

    history_size: int = 10
    lr: float = 1.0
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    max_line_search: int = 25
    max_iterations: int = -1

    @property
    def num_vectors(self) -> int:
        """Slots that are needed besides the weights: pairs, a new pair, and what a line search holds."""
        return 2 * self.history_size + 7


@dataclass(frozen=True)
class Pair:
    """What is remembered of an iteration.

    Args:
        step: Slot of ``s``, the change of the weights.
        change: Slot of ``y``, the change of the gradient.
        rho: ``1 / (y s)``.

    """

    step: int
    change: int
    rho: float


@dataclass(frozen=True)
class Point:
    """Where the optimizer has come to.

    Args:
        weights: Slot of the weights.
        gradient: Slot of the gradient there.
        loss: The loss there.
        largest_gradient: Its largest absolute element.
        iteration: How many have led here.
        num_evaluations: How many evaluations have.
        step_length: Of the last iteration.
        scale: Of the inverse Hessian that the pairs correct, ``H_0``.
        pairs: The history, the oldest first.

    """

    weights: int
    gradient: int
    loss: float
    largest_gradient: float
    iteration: int = 0
    num_evaluations: int = 0
    step_length: float = 0.0
    scale: float = 1.0
    pairs: tuple[Pair, ...] = ()

    @property
    def slots(self) -> list[int]:
        """All slots that it names, in an order of its own."""
        return [self.weights, self.gradient, *(slot for pair in self.pairs for slot in (pair.step, pair.change))]

    def header(self) -> dict[str, Any]:
        """As it is sent and written."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"pairs": [[pair.step, pair.change, pair.rho] for pair in self.pairs]}

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Point:
        """What :meth:`header` has said."""
        pairs = tuple(Pair(int(step), int(change), float(rho)) for step, change, rho in header["pairs"])
        return cls(**{**header, "pairs": pairs})

    def moved(self) -> Point:
        """The same with other slots: the first ones, as :attr:`slots` orders them. That is where a checkpoint goes."""
        pairs = tuple(replace(pair, step=2 * n + 3, change=2 * n + 4) for n, pair in enumerate(self.pairs))
        return replace(self, weights=1, gradient=2, pairs=pairs)


class SlotPool:
    """Slots that hold nothing anybody needs.

    Args:
        num_vectors: How many there are besides the weights.

    """

    def __init__(self, num_vectors: int) -> None:
        self._all = frozenset(range(WEIGHTS + 1, num_vectors + 1))
        self._free = set(self._all)

    def take(self) -> int:
        """One of them, from here on in use."""
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """It is not needed any more."""
        self._free.add(slot)

    def keep_only(self, *slots: int) -> None:
        """Only these are in use."""
        self._free = set(self._all - set(slots))


Operation = Combine | Evaluate | Point
Steps = Generator[Operation, Any, str]


class Lbfgs:
    """The optimizer.

    Args:
        options: Its settings.
        point: Where to go on; None to begin with the weights that lie in slot 1 and in ``WEIGHTS``.

    Example:
        >>> steps = Lbfgs(LbfgsOptions(history_size=2)).steps()
        >>> next(steps)
        Evaluate(gradient=2)
        >>> steps.send(0.5).reductions
        (Reduction(kind='largest', first=2, second=0),)

    """

    def __init__(self, options: LbfgsOptions, point: Point | None = None) -> None:
        self.options = options
        self._point = point
        self._pool = SlotPool(options.num_vectors)

    def steps(self) -> Steps:
        """Yield what is to be done: a :class:`Combine`, an :class:`Evaluate`, or a :class:`Point` to be kept.

        Returns:
            Why it has ended.

        Raises:
            FloatingPointError: The loss at the first weights is infinite or NaN.

        """
        options = self.options
        point = self._point
        if point is None:
            self._pool.keep_only(1)
            gradient = self._pool.take()
            loss = yield Evaluate(gradient)
            (size,) = yield Combine(reductions=(largest(gradient),))
            if not (math.isfinite(loss) and math.isfinite(size)):
                raise FloatingPointError(
                    f"At the first weights the loss of the whole batch is {loss}, and its gradient's largest element"
                    f" {size}: nothing can be optimized from there. Look at the data, and at how weights begin."
                )
            point = Point(1, gradient, loss, size, num_evaluations=1)
            yield point
        while True:
            if point.largest_gradient <= options.tolerance_grad:
                return f"the gradient is below tolerance_grad={options.tolerance_grad:g}"
            if 0 <= options.max_iterations <= point.iteration:
                return "max_steps"
            self._pool.keep_only(*point.slots)
            direction, slope, length = yield from self._direction(point)
            if slope > -options.tolerance_change:
                return f"no direction descends by more than tolerance_change={options.tolerance_change:g}"
            step = options.lr
            if point.iteration == 0:
                (total,) = yield Combine(reductions=(absolute_sum(point.gradient),))
                step = min(1.0, 1.0 / total) * options.lr
            search = LineSearch(self._pool, point.weights, direction, length, options.tolerance_change)
            start = Trial(0.0, point.loss, point.gradient, slope)
            found, num_evaluations = yield from search.steps(start, step, options.max_line_search)
            before = point
            point = yield from self._arrive(point, direction, found, num_evaluations)
            yield point
            if length * found.step <= options.tolerance_change:
                return f"a step changes no weight by more than tolerance_change={options.tolerance_change:g}"
            if abs(point.loss - before.loss) < options.tolerance_change:
                return f"a step changes the loss by less than tolerance_change={options.tolerance_change:g}"

    def _direction(self, point: Point) -> Generator[Operation, Any, tuple[int, float, float]]:
        """The two loops over the history. Vector after vector, the next product comes with the one before.

        Returns:
            Slot of the direction, its product with the gradient, and its largest absolute element.

        """
        pool, pairs, gradient = self._pool, point.pairs, point.gradient
        out = pool.take()
        if not pairs:
            slope, length = yield Combine(out, ((-point.scale, gradient),), (dot(gradient, out), largest(out)))
            return out, slope, length
        spare = pool.take()
        (product,) = yield Combine(out, ((-1.0, gradient),), (dot(pairs[-1].step, out),))
        alphas = [0.0] * len(pairs)
        for index in range(len(pairs) - 1, -1, -1):
            pair = pairs[index]
            alphas[index] = product * pair.rho
            other = pairs[index - 1].step if index else pairs[0].change
            terms = ((1.0, out), (-alphas[index], pair.change))
            (product,) = yield Combine(spare, terms, (dot(other, spare),))
            out, spare = spare, out
        factor, product = point.scale, product * point.scale  # of the vector so far, which is scaled in passing
        slope = length = 0.0
        for index, pair in enumerate(pairs):
            beta = product * pair.rho
            terms = ((factor, out), (alphas[index] - beta, pair.step))
            if index + 1 < len(pairs):
                (product,) = yield Combine(spare, terms, (dot(pairs[index + 1].change, spare),))
            else:
                slope, length = yield Combine(spare, terms, (dot(gradient, spare), largest(spare)))
            out, spare, factor = spare, out, 1.0
        pool.keep_only(*point.slots, out)
        return out, slope, length

    def _arrive(
        self, point: Point, direction: int, found: Trial, num_evaluations: int
    ) -> Generator[Operation, Any, Point]:
        """Go to where the line search has come, and remember the way."""
        pool = self._pool
        pool.keep_only(*point.slots, direction, found.gradient)
        weights, step, change = pool.take(), pool.take(), pool.take()
        yield Combine(weights, ((1.0, point.weights), (found.step, direction)))
        yield Combine(step, ((found.step, direction),))
        curvature, square, size = yield Combine(
            change,
            ((1.0, found.gradient), (-1.0, point.gradient)),
            (dot(change, step), dot(change, change), largest(found.gradient)),
        )
        pairs, scale = point.pairs, point.scale
        if curvature > _LEAST_CURVATURE:
            pairs = (*pairs, Pair(step, change, 1.0 / curvature))[-self.options.history_size :]
            scale = curvature / square
        return Point(
            weights, found.gradient, found.loss, size, point.iteration + 1,
            point.num_evaluations + num_evaluations, found.step, scale, pairs,
        )  # fmt: skip
