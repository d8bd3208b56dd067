"""A line search for the strong Wolfe conditions, as :mod:`torch.optim.lbfgs` has it, over vectors on shards."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

from .operations import WEIGHTS, Combine, Evaluate, dot

_DECREASE, _CURVATURE = 1e-4, 0.9  # c_1 and c_2
_MARGIN = 0.1  # of the bracket: a trial nearer to its end makes too little progress


class Trial(NamedTuple):
    """A point on the line.

    Args:
        step: Its step length.
        loss: The loss there.
        gradient: Slot of the gradient there.
        slope: The gradient's product with the direction.

    """

    step: float
    loss: float
    gradient: int
    slope: float


class Slots(Protocol):
    """Where slots come from."""

    def take(self) -> int:
        """One that is free."""

    def give_back(self, slot: int) -> None:
        """One that is not needed any more."""


Search = Generator[Combine | Evaluate, Any, tuple[Trial, int]]


class LineSearch:
    """One line search.

    Args:
        slots: Where gradients of trials go.
        weights: Slot of the weights from which the line starts.
        direction: Slot of its direction.
        length: The direction's largest absolute element.
        tolerance_change: A bracket in which no weight differs by more is not divided further.

    """

    def __init__(self, slots: Slots, weights: int, direction: int, length: float, tolerance_change: float) -> None:
        self._slots = slots
        self._weights, self._direction = weights, direction
        self._length = length
        self._tolerance_change = tolerance_change

    def steps(self, start: Trial, step: float, max_evaluations: int) -> Search:
        """Yield what is to be computed.

        Args:
            start: Where the line starts.
            step: First step length to try.
            max_evaluations: Of this search.

        Returns:
            The trial to go to, and how many evaluations there were.

        """
        self._start = start
        self._num = 0
        low, high = yield from self._bracket(step, max_evaluations)
        if high is not None:
            low = yield from self._zoom(low, high, max_evaluations)
        return low, self._num

    def _try(self, step: float) -> Generator[Combine | Evaluate, Any, Trial]:
        gradient = self._slots.take()
        yield Combine(WEIGHTS, ((1.0, self._weights), (step, self._direction)))
        loss = yield Evaluate(gradient)
        self._num += 1
        (slope,) = yield Combine(reductions=(dot(gradient, self._direction),))
        is_number = math.isfinite(loss) and math.isfinite(slope)
        return Trial(step, loss if is_number else math.inf, gradient, slope)

    def _drop(self, trial: Trial, *kept: Trial) -> None:
        if trial.gradient not in {self._start.gradient, *(other.gradient for other in kept)}:
            self._slots.give_back(trial.gradient)

    def _decreases(self, trial: Trial) -> bool:
        return trial.loss <= self._start.loss + _DECREASE * trial.step * self._start.slope

    def _is_flat(self, trial: Trial) -> bool:
        return abs(trial.slope) <= -_CURVATURE * self._start.slope

    def _bracket(self, step: float, max_evaluations: int) -> Generator[Combine | Evaluate, Any, Any]:
        """Go out until the conditions hold, or must hold somewhere behind."""
        before = self._start
        trial = yield from self._try(step)
        for iteration in range(max_evaluations):
            if not self._decreases(trial) or (iteration > 1 and trial.loss >= before.loss):
                return before, trial
            if self._is_flat(trial):
                self._drop(before, trial)
                return trial, None
            if trial.slope >= 0:
                return before, trial
            bounds = (trial.step + 0.01 * (trial.step - before.step), 10 * trial.step)
            step = interpolate(before, trial, bounds)
            self._drop(before, trial)
            before = trial
            trial = yield from self._try(step)
        self._drop(before, trial)
        better = trial if trial.loss < self._start.loss else self._start
        return better, None

    def _zoom(self, first: Trial, second: Trial, max_evaluations: int) -> Generator[Combine | Evaluate, Any, Trial]:
        """Divide a bracket until the conditions hold."""
        ends = [first, second]
        low = 0 if first.loss <= second.loss else 1  # which of them
        is_slow = False
        while self._num <= max_evaluations:
            left, right = sorted(end.step for end in ends)
            if (right - left) * self._length < self._tolerance_change:
                break
            step = interpolate(ends[0], ends[1])
            margin = _MARGIN * (right - left)
            if min(right - step, step - left) < margin:
                if is_slow or step >= right or step <= left:
                    step = right - margin if abs(step - right) < abs(step - left) else left + margin
                    is_slow = False
                else:
                    is_slow = True
            else:
                is_slow = False
            trial = yield from self._try(step)
            if not self._decreases(trial) or trial.loss >= ends[low].loss:
                self._replace(ends, 1 - low, trial)
                low = 0 if ends[0].loss <= ends[1].loss else 1
                continue
            ends_well = self._is_flat(trial)
            if not ends_well and trial.slope * (ends[1 - low].step - ends[low].step) >= 0:
                self._replace(ends, 1 - low, ends[low])
            self._replace(ends, low, trial)
            if ends_well:
                break
        self._drop(ends[1 - low], ends[low])
        return ends[low]

    def _replace(self, ends: list[Trial], which: int, trial: Trial) -> None:
        """Let another trial be an end of the bracket."""
        gone, ends[which] = ends[which], trial
        self._drop(gone, *ends)


def interpolate(first: Trial, second: Trial, bounds: tuple[float, float] | None = None) -> float:
    """The least of the cubic through two trials, inside bounds.

    Args:
        first: One trial.
        second: Another, elsewhere.
        bounds: Least and largest step length; None: those of the trials.

    Example:
        >>> interpolate(Trial(0.0, 1.0, 0, -2.0), Trial(3.0, 4.0, 0, 4.0))  # of (step - 1) ** 2
        1.0

    """
    low, high = bounds or sorted((first.step, second.step))
    left, right = (first, second) if first.step <= second.step else (second, first)
    width = right.step - left.step
    if width > 0.0 and math.isfinite(left.loss) and math.isfinite(right.loss):
        middle = left.slope + right.slope - 3 * (right.loss - left.loss) / width
        square = middle * middle - left.slope * right.slope
        if square >= 0.0:
            root = math.sqrt(square)
            bottom = right.slope - left.slope + 2 * root
            if bottom != 0.0:
                least = right.step - width * ((right.slope + root - middle) / bottom)
                return min(max(least, low), high)
    return (low + high) / 2
